"""Parts made elsewhere: jobs, which are flow runs of a deployment, each with some parts to make.

A job runs wherever its work pool starts it: a process, a container, a Kubernetes job, with the device that the pool's
template asks for. This module keeps a few of them under way, short enough for others to have their turn, and looks at
the workspace to learn what a job got done: its Prefect state may never come when a machine dies.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.filters import FlowRunFilterTags as Tags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Cancelling, Crashed

from fastgda_core.errors import UsageError
from storage_schemas.attempts import Attempt, ShardState, read_attempts
from storage_schemas.liveness import Beat, read_beats
from storage_schemas.workspace import Workspace
from tasks.execution_config import PoolConfig
from tasks.fan_out import Failure, Order, Outcome, quarantine_deadly
from tasks.number_ranges import as_ranges, from_ranges
from tasks.progress import console

POLL_SECONDS = 2.0
SHORTEST_JOB = 60.0  # seconds of work: below it, the start of a process costs more than the job
PROBE_PARTS = 4  # in a job while nothing is known of how long a part takes
IDLE_JOBS = 5  # in a row that end before they start a part: then no worker can do this
UNTAKEN_SECONDS = 60.0  # after which somebody is told that no worker takes a job
HUNG_FACTOR = 1.5  # x the time limit of a part, after which its job is ended from outside
_UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
]
_UNREACHABLE = (httpx.HTTPError, PrefectException, ConnectionError)


@dataclass
class _Job:
    flow_run: UUID
    name: str
    pool: PoolConfig
    numbers: list[int]
    created: float = field(default_factory=time.monotonic)
    beat: int = -1
    beat_changed: float = field(default_factory=time.monotonic)
    ending: bool = False  # it was told to end


@dataclass
class JobPool:
    """The jobs of one kind of part of one run.

    part_seconds: what one part takes, as far as is known by now.
    missing: which parts are not committed at this moment.
    """

    workspace: Workspace
    order: Order
    part_seconds: Callable[[], float | None]
    missing: Callable[[], list[int]]
    _jobs: list[_Job] = field(default_factory=list)
    _known: dict[int, int] = field(default_factory=dict)  # attempt records of a part, when it was last looked at
    _idle: int = 0
    _told: bool = False

    def make(self, numbers: list[int], tick: Callable[[], bool]) -> Outcome:
        """Keep jobs under way until every part is there, failed, or somebody stops it."""
        outcome = Outcome()
        self._known = {number: len(several) for number, several in self._attempts().items()}
        with get_client(sync_client=True) as client:
            while not self._adopt(client):
                time.sleep(POLL_SECONDS)  # the server is away
            held = {number for job in self._jobs for number in job.numbers}
            waiting = deque(number for number in numbers if number not in held)
            try:
                while self._jobs or (waiting and not outcome.stopped):
                    outcome.stopped |= not tick()
                    if not outcome.stopped:
                        self._start(waiting)
                    time.sleep(POLL_SECONDS)
                    for job in self._ended(client, stopping=outcome.stopped):
                        back = self._settle(job, outcome)
                        waiting.extendleft(reversed(back))
                    if self._idle >= IDLE_JOBS:
                        raise UsageError(
                            f"{self._idle} jobs in a row ended before they started a part: look at the Prefect flow "
                            f"runs tagged run:{self.order.run}, mend the workers' environment, then "
                            f"`fastgda retry {self.order.run}`"
                        )
            except BaseException:
                self._end_all(client)
                raise
        return outcome

    def _tags(self) -> list[str]:
        return ["fastgda", f"run:{self.order.run}", f"kind:{self.order.kind}"]

    def _adopt(self, client: SyncPrefectClient) -> bool:
        """Take over the jobs that a coordinator of this run left under way when it died; False where nobody answers."""
        chosen = FlowRunFilter(
            tags=Tags(all_=self._tags()),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)),
        )
        try:
            under_way = client.read_flow_runs(flow_run_filter=chosen, limit=200)
        except _UNREACHABLE:
            return False
        for found in under_way:
            numbers = from_ranges(str(found.parameters.get("numbers", "")))
            self._jobs.append(_Job(found.id, found.name, self._pool_of(found), numbers))
        return True

    def _pool_of(self, flow_run: FlowRun) -> PoolConfig:
        named = [pool for pool in self.order.execution.pools if pool.queue == flow_run.work_queue_name]
        return (named or list(self.order.execution.pools))[0]

    def _start(self, waiting: deque[int]) -> None:
        """New jobs for the free slots."""
        order = self.order
        for pool in self.order.execution.pools:
            while waiting and sum(job.pool == pool for job in self._jobs) < pool.slots:
                numbers = [waiting.popleft() for _ in range(min(len(waiting), self._size(pool, len(waiting))))]
                try:
                    started = run_deployment(
                        name=pool.deployment,
                        parameters={
                            "location": order.location,
                            "run": order.run,
                            "assignment": order.assignment,
                            "kind": order.kind,
                            "numbers": as_ranges(numbers),
                            "execution": order.execution.model_dump(mode="json"),
                            "timeout": order.timeout(self.part_seconds()),
                        },
                        timeout=0,
                        flow_run_name=f"{order.kind} {order.run} {as_ranges(numbers)[:60]}",
                        tags=self._tags(),
                        work_queue_name=pool.queue,
                        as_subflow=True,
                    )
                except ObjectNotFound as error:
                    raise UsageError(
                        f"execution.pools names the deployment {pool.deployment!r}, which this server does not have: "
                        "deploy it (`prefect deploy --all`) or correct the name"
                    ) from error
                except _UNREACHABLE:
                    waiting.extendleft(reversed(numbers))  # the server is away: at the next poll again
                    return
                self._jobs.append(_Job(started.id, started.name, pool, numbers))

    def _size(self, pool: PoolConfig, waiting: int) -> int:
        """Parts in the next job: as many as others can wait for, fewer towards the end, so that all end at once."""
        slots = sum(each.slots for each in self.order.execution.pools)
        share = math.ceil(waiting / (2 * slots))
        known = self.part_seconds()
        if known is None:
            return min(PROBE_PARTS, share)
        seconds = max(known, 1e-3) / pool.speed
        longest = max(1, int(60 * self.order.execution.job_minutes / seconds))
        shortest = min(longest, max(1, int(SHORTEST_JOB / seconds)))
        return min(longest, max(shortest, share))

    def _ended(self, client: SyncPrefectClient, *, stopping: bool) -> Iterator[_Job]:
        """Jobs that are over, or whose worker is gone; these are taken off the list.

        Those that work stop by themselves when the run is to stop; those that wait for a worker are called off.
        """
        try:
            ids = [job.flow_run for job in self._jobs]
            chosen = FlowRunFilter(id=FlowRunFilterId(any_=ids))
            found = {run.id: run for run in client.read_flow_runs(flow_run_filter=chosen)} if ids else {}
        except _UNREACHABLE:
            return  # workers go on without the server
        beats = {beat.job: beat for beat in read_beats(self.workspace, self.order.run)}
        for job in list(self._jobs):
            flow_run = found.get(job.flow_run)
            state = flow_run.state if flow_run else None
            started = state is not None and (state.is_running() or state.is_cancelling())
            if state is None or state.is_final() or (started and self._is_lost(client, job, beats)):
                self._jobs.remove(job)
                yield job
            elif not started:
                job.beat_changed = time.monotonic()  # it waits for a worker
                self._tell_untaken(job)
                if stopping:
                    self._force(client, job, Cancelled(message="the run is to stop"))

    def _is_lost(self, client: SyncPrefectClient, job: _Job, beats: dict[str, Beat]) -> bool:
        """Whether nothing has been heard of the job's process for too long, or it hangs over a part."""
        beat, now = beats.get(str(job.flow_run)), time.monotonic()
        if beat is not None and beat.beat != job.beat:
            job.beat, job.beat_changed = beat.beat, now
        silent = now - job.beat_changed > self.order.execution.lost_after
        timeout = self.order.timeout(self.part_seconds())
        hung = beat is not None and timeout is not None and beat.part_seconds > HUNG_FACTOR * timeout
        if hung and not silent:
            if not job.ending:
                job.ending = True
                self._force(client, job, Cancelling(message="it hangs over a part"))
            return False
        if silent:
            message = f"no sign of life for {self.order.execution.lost_after:.0f} s"
            self._force(client, job, Crashed(message=message))
        return silent

    def _force(self, client: SyncPrefectClient, job: _Job, state: State[None]) -> None:
        """Say in Prefect how a job stands; what becomes of its parts does not hang on it."""
        try:
            client.set_flow_run_state(job.flow_run, state, force=True)
        except _UNREACHABLE:
            return

    def _settle(self, job: _Job, outcome: Outcome) -> list[int]:
        """Note what a finished job left undone; returns the parts that are to be tried again."""
        undone = sorted(set(self.missing()) & set(job.numbers))
        attempts = self._attempts()
        back, tried = [], len(undone) < len(job.numbers)
        for number in undone:
            several = attempts.get(number, [])
            fresh = several[self._known.get(number, 0) :]
            self._known[number] = len(several)
            tried |= bool(fresh)
            last = fresh[-1] if fresh else None
            if last is not None and last.state == ShardState.failed:
                outcome.failures[number] = Failure(self.order.kind, number, last.error_class, last.error)
            else:
                back.append(number)
        self._idle = 0 if tried or outcome.stopped else self._idle + 1
        deadly = quarantine_deadly(
            self.workspace, self.order.run, self.order.kind, back, self.order.execution.max_deaths
        )
        outcome.failures |= deadly
        return [number for number in back if number not in deadly]

    def _attempts(self) -> dict[int, list[Attempt]]:
        return read_attempts(self.workspace, self.order.run, self.order.kind)

    def _tell_untaken(self, job: _Job) -> None:
        if not self._told and time.monotonic() - job.created > UNTAKEN_SECONDS:
            self._told = True
            console.print(
                f"[yellow]waiting:[/] no worker has taken a job of {job.pool.deployment} for {UNTAKEN_SECONDS:.0f} s; "
                "is one running, and has its pool a free slot? `prefect worker start --pool POOL` starts one",
                highlight=False,
            )

    def _end_all(self, client: SyncPrefectClient) -> None:
        for job in self._jobs:
            self._force(client, job, Cancelling(message="its coordinator ended"))
