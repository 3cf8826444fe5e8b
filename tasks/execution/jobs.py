"""Jobs that make parts elsewhere: flow runs of a deployment, each with some parts to make.

A job runs wherever its work pool starts it: a process, a container, a Kubernetes job, with the device that the pool's
template asks for. This module keeps a few of them under way, short enough for others to have their turn, and looks at
the workspace to learn what a job got done: its Prefect state may never come when a machine dies.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.filters import FlowRunFilterTags as Tags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed

from fastgda_core.errors import UsageError
from storage_schemas.runs.attempts import Attempt, ShardState, read_attempts
from storage_schemas.runs.liveness import Beat, read_beats
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.config.execution import PoolConfig
from tasks.execution.fan_out import WorkOrder, quarantine_deadly
from tasks.execution.number_ranges import as_ranges, from_ranges
from tasks.execution.outcomes import Failure, Outcome
from tasks.execution.worker import HUNG_FACTOR
from tasks.watching.prefect_answers import away, refusal, tolerated

POLL_SECONDS = 2.0
SHORTEST_JOB = 60.0  # seconds of work: below it, the start of a process costs more than the job
PROBE_PARTS = 4  # in a job while nothing is known of how long a part takes
IDLE_JOBS = 5  # in a row that end before they start a part: then no worker can do this
UNTAKEN_SECONDS = 60.0  # after which somebody is told that no worker takes a job
_UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
]
log = logging.getLogger("fastgda.execution.jobs")
PAGE = 200  # flow runs in one answer, at most: PREFECT_SERVER_API_DEFAULT_LIMIT
T = TypeVar("T")


@dataclass
class _Job:
    flow_run: UUID
    name: str
    pool: PoolConfig
    numbers: list[int]
    created: float = field(default_factory=time.monotonic)
    beat: int = -1
    beat_changed: float = field(default_factory=time.monotonic)
    taken: float | None = None  # when it was first seen in the hands of a worker that had not started it
    ending: bool = False  # it was told to end


@dataclass(frozen=True)
class _Request:
    """A job to be started. By its key the server starts it once, however often it is asked."""

    pool: PoolConfig
    numbers: list[int]
    key: str = field(default_factory=lambda: uuid4().hex)


@dataclass
class JobPool:
    """The jobs of one kind of part of one run.

    part_seconds: returns what one part takes, as far as is known by now.
    missing: returns the parts that are not committed at this moment.
    """

    workspace: Workspace
    order: WorkOrder
    part_seconds: Callable[[], float | None]
    missing: Callable[[], list[int]]
    _jobs: list[_Job] = field(default_factory=list)
    _known: dict[int, int] = field(default_factory=dict)  # attempt records of a part, when it was last looked at
    _idle: int = 0
    _told: bool = False
    _unanswered: _Request | None = None  # the server was away before it said whether it has started this one
    _waiting: bool = False

    def make(self, numbers: list[int], tick: Callable[[], bool]) -> Outcome:
        """Keep jobs under way until every part is there or failed, or somebody stops the run.

        Raises:
            UsageError: the server refuses a job, or no worker can do one.
        """
        outcome = Outcome()
        self._known = {number: len(attempts) for number, attempts in self._attempts().items()}
        # Prefect's client would try for minutes by itself, in which nobody could stop the run.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}), get_client(sync_client=True) as client:
            while not self._adopt(client):
                if not tick():
                    return Outcome(stopped=True)
                time.sleep(POLL_SECONDS)
            held = {number for job in self._jobs for number in job.numbers}
            waiting = deque(number for number in numbers if number not in held)
            try:
                while self._jobs or ((waiting or self._unanswered) and not outcome.stopped):
                    outcome.stopped |= not tick()
                    if not outcome.stopped:
                        self._start(waiting)
                    time.sleep(POLL_SECONDS)
                    for job in self._ended(client, stopping=outcome.stopped):
                        back = self._settle(job, outcome)
                        waiting.extendleft(reversed(back))
                        log.info(
                            "job %s is over; %d of its %d parts are to be made yet",
                            job.name,
                            len(back),
                            len(job.numbers),
                        )
                    if self._idle >= IDLE_JOBS:
                        raise UsageError(
                            f"{self._idle} jobs in a row ended before they started a part: look at the Prefect flow "
                            f"runs tagged run:{self.order.run}, mend the workers' environment, then "
                            f"{command(self.workspace, f'retry {self.order.run}')}"
                        )
            except BaseException:
                self._end_all(client)
                raise
        return outcome

    def _tags(self) -> list[str]:
        return ["fastgda", f"run:{self.order.run}", f"kind:{self.order.kind}"]

    def _adopt(self, client: SyncPrefectClient) -> bool:
        """Take over the jobs that a coordinator of this run left under way when it died.

        False where the server does not answer.
        """
        under_way: list[FlowRun] = []
        while True:
            unlisted = FlowRunFilter(
                tags=Tags(all_=self._tags()),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)),
                id=FlowRunFilterId(not_any_=[flow_run.id for flow_run in under_way]),
            )
            page = self._page(client, unlisted)
            if page is None:
                return False
            under_way += page
            if len(page) < PAGE:
                break
        deployments = self._deployments(client) if under_way else {}
        if deployments is None:
            return False
        for flow_run in under_way:
            numbers = from_ranges(str(flow_run.parameters.get("numbers", "")))
            self._jobs.append(_Job(flow_run.id, flow_run.name, self._pool_of(flow_run, deployments), numbers))
            log.info("job %s of an earlier coordinator goes on, with %d parts", flow_run.name, len(numbers))
        return True

    def _page(self, client: SyncPrefectClient, asked_for: FlowRunFilter) -> list[FlowRun] | None:
        return self._answer("list the run's jobs", lambda: client.read_flow_runs(flow_run_filter=asked_for, limit=PAGE))

    def _deployments(self, client: SyncPrefectClient) -> dict[str, UUID] | None:
        """Return the server's ids of the deployments of the pools; None while it is away."""
        ids = {}
        for pool in self.order.execution.pools:
            ask = functools.partial(client.read_deployment_by_name, pool.deployment)
            deployment = self._answer(f"show {pool.deployment}", ask, pool)
            if deployment is None:
                return None
            ids[pool.deployment] = deployment.id
        return ids

    def _pool_of(self, flow_run: FlowRun, deployments: dict[str, UUID]) -> PoolConfig:
        pools = self.order.execution.pools
        same = [pool for pool in pools if deployments[pool.deployment] == flow_run.deployment_id]
        # Of the pools that share a deployment, one without a queue takes what no other one names.
        fit = [pool for pool in same if pool.queue == flow_run.work_queue_name] or [p for p in same if p.queue is None]
        return (fit or same or list(pools))[0]

    def _answer(self, asked: str, ask: Callable[[], T], pool: PoolConfig | None = None) -> T | None:
        """Return what the server says; None while it is away, which is told once.

        Raises:
            UsageError: the server refuses, and will do so again.
        """
        try:
            answer = ask()
        except ObjectNotFound as error:
            if pool is None:
                raise refusal(error, asked) from error
            raise UsageError(
                f"execution.pools names the deployment {pool.deployment!r}, which this server does not have: "
                "deploy it (`prefect deploy --all`) or correct the name"
            ) from error
        except Exception as error:
            if not away(error):
                raise refusal(error, asked) from error
            if not self._waiting:
                log.warning(
                    "waiting: the Prefect server is away (%s); jobs under way go on, and `fastgda cancel %s` stops "
                    "the run",
                    " ".join(str(error).split()) or type(error).__name__,
                    self.order.run,
                )
            self._waiting = True
            return None
        if self._waiting:
            log.warning("the Prefect server answers again")
        self._waiting = False
        return answer

    def _start(self, waiting: deque[int]) -> None:
        """Start new jobs for the free slots."""
        if self._unanswered is not None and not self._submit(self._unanswered):
            return
        for pool in self.order.execution.pools:
            while waiting and sum(job.pool == pool for job in self._jobs) < pool.slots:
                numbers = [waiting.popleft() for _ in range(min(len(waiting), self._size(pool, len(waiting))))]
                if not self._submit(_Request(pool, numbers)):
                    return

    def _submit(self, request: _Request) -> bool:
        """Start a job; False while the server is away, and then the same job is to be asked for again."""
        order, pool, numbers = self.order, request.pool, as_ranges(request.numbers)
        started = self._answer(
            f"start a run of {pool.deployment}",
            lambda: run_deployment(
                name=pool.deployment,
                parameters={
                    "location": order.location,
                    "run": order.run,
                    "assignment": order.assignment,
                    "kind": order.kind,
                    "numbers": numbers,
                    "execution": order.execution.model_dump(mode="json"),
                    "timeout": order.timeout(self.part_seconds()),
                },
                timeout=0,
                flow_run_name=f"{order.kind} {order.run} {numbers[:60]}",
                tags=self._tags(),
                idempotency_key=request.key,
                work_queue_name=pool.queue,
                as_subflow=True,
            ),
            pool,
        )
        assert not isinstance(started, Coroutine)  # which it is where an event loop runs
        self._unanswered = request if started is None else None
        if started is not None:
            self._jobs.append(_Job(started.id, started.name, pool, request.numbers))
            log.info("job %s is submitted to %s", started.name, pool.deployment)
        return started is not None

    def _size(self, pool: PoolConfig, waiting: int) -> int:
        """Return the parts in the next job.

        They are as many as others can wait for, and fewer towards the end, so that all jobs end at once.
        """
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
        """Yield jobs that are over, or whose worker is gone, before or after it started them; take them off the list.

        When the run is to stop, jobs at work stop by themselves, and those that wait for a worker are called off.
        """
        flow_runs: dict[UUID, FlowRun] = {}
        for start in range(0, len(self._jobs), PAGE):
            ids = [job.flow_run for job in self._jobs[start : start + PAGE]]
            page = self._page(client, FlowRunFilter(id=FlowRunFilterId(any_=ids)))
            if page is None:
                return  # workers go on without the server
            flow_runs |= {run.id: run for run in page}
        beats = {beat.job: beat for beat in read_beats(self.workspace, self.order.run)}
        for job in list(self._jobs):
            flow_run = flow_runs.get(job.flow_run)
            state = flow_run.state if flow_run else None
            # A job that the server does not show may be at work, as long as it gives signs of life.
            if state is None or state.is_running() or state.is_cancelling():
                over = self._is_lost(client, job, beats)
            else:
                over = state.is_final() or self._is_stuck(client, job, state)
                if stopping and not over:
                    self._force(client, job, Cancelled(message="the run is to stop"))
            if over:
                self._jobs.remove(job)
                yield job

    def _is_stuck(self, client: SyncPrefectClient, job: _Job, state: State[None]) -> bool:
        """Return whether a worker took a job and never started it; Prefect leaves such a job pending for ever."""
        now = job.beat_changed = time.monotonic()  # no beat is to be expected yet
        if not state.is_pending():
            job.taken = None
            self._tell_untaken(job)
            return False
        job.taken = now if job.taken is None else job.taken
        stuck = now - job.taken > self.order.execution.start_within
        if stuck:
            message = f"a worker took it and did not start it within {self.order.execution.start_within:.0f} s"
            log.warning("job %s is given up: %s; its parts are made by others", job.name, message)
            self._force(client, job, Crashed(message=message))
        return stuck

    def _is_lost(self, client: SyncPrefectClient, job: _Job, beats: dict[str, Beat]) -> bool:
        """Return whether nothing has been heard of the job's process for too long; tell one that hangs to end."""
        beat, now = beats.get(str(job.flow_run)), time.monotonic()
        if beat is not None and beat.beat != job.beat:
            job.beat, job.beat_changed = beat.beat, now
        silent = now - job.beat_changed > self.order.execution.lost_after
        timeout = self.order.timeout(self.part_seconds())
        hung = beat is not None and timeout is not None and beat.part_seconds > HUNG_FACTOR * timeout
        if hung and not silent:
            if not job.ending:
                log.warning("job %s hangs over a part; it is told to end", job.name)
                job.ending = self._force(client, job, Cancelling(message="it hangs over a part"))
            return False
        if silent:
            message = f"no sign of life for {self.order.execution.lost_after:.0f} s"
            log.warning("job %s has given %s; its parts are made by others", job.name, message)
            self._force(client, job, Crashed(message=message))
        return silent

    def _force(self, client: SyncPrefectClient, job: _Job, state: State[None]) -> bool:
        """Set a job's state in Prefect, on which its parts do not depend; False where the server is away."""
        with tolerated(f"say how the job {job.name} stands"):
            client.set_flow_run_state(job.flow_run, state, force=True)
            return True
        return False

    def _settle(self, job: _Job, outcome: Outcome) -> list[int]:
        """Note what a finished job left undone; return the parts that are to be tried again."""
        undone = sorted(set(self.missing()) & set(job.numbers))
        attempts = self._attempts()
        back, tried = [], len(undone) < len(job.numbers)
        for number in undone:
            all_attempts = attempts.get(number, [])
            new_attempts = all_attempts[self._known.get(number, 0) :]
            self._known[number] = len(all_attempts)
            tried |= bool(new_attempts)
            last = new_attempts[-1] if new_attempts else None
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
            log.warning(
                "waiting: no worker has taken a job of %s for %.0f s; is one running, and has its pool a free slot? "
                "`prefect worker start --pool POOL` starts one",
                job.pool.deployment,
                UNTAKEN_SECONDS,
            )

    def _end_all(self, client: SyncPrefectClient) -> None:
        for job in self._jobs:
            self._force(client, job, Cancelling(message="its coordinator ended"))
