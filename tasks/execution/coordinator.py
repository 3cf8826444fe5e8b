"""The coordinator of a run: it makes what is missing, part by part, wherever the configuration says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.task_runners import TaskRunner
from rich.markup import escape

from fastgda_core.interruption import checkpoint
from storage_schemas.errors import StoreError
from storage_schemas.runs.attempts import ShardState, deaths, read_attempts
from storage_schemas.runs.ledger import kept_ledger
from storage_schemas.runs.liveness import Beat, RunRequest, asked, read_assignment, withdraw, write_assignment
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks import logs
from tasks.artifact import Made, making
from tasks.execution import cancellation
from tasks.execution.cost import known_rate, mean_captions, median_seconds, run_costs
from tasks.execution.fan_out import WorkOrder, quarantine_deadly, run_parts
from tasks.execution.job_arrays import JobArrays, end_tasks
from tasks.execution.jobs import JobPool
from tasks.execution.outcomes import Failure, Outcome, PartHangs, RunCancelled, RunIncomplete
from tasks.execution.runners import submission, task_runner
from tasks.execution.worker import coordinate_here
from tasks.parts import Parts, Standing
from tasks.progress import console, stage
from tasks.teaching.cost import Size
from tasks.teaching.preparation import Preparation
from tasks.teaching.run import Work, hold
from tasks.teaching.score_plan import store_plan
from tasks.watching import events
from tasks.watching.artifacts import Board
from tasks.watching.run_status import others_at_work

log = logging.getLogger("fastgda.execution")
PAUSE_LOOK_SECONDS = 1.0
ELSEWHERE = ("pool", "slurm")  # runners of processes that tell of what they make by the workspace alone
SAMPLE_PARTS = 9  # whose seconds tell what a part takes


@dataclass(eq=False)
class Coordinator:
    """Makes the parts of one run inside a `with` block, and keeps worker processes as long as the block lasts.

    assignment: key of the assignment that workers load.
    part_seconds: estimate of what one part takes, by kind.
    """

    run: Work
    assignment: str
    part_seconds: dict[str, float]
    _runner: TaskRunner[Any] | None = None
    _queued: bool = False  # tasks may wait in Slurm's queue

    def __post_init__(self) -> None:
        self._board = Board(self.run.workspace, self.run.name)
        self._begun = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, PartHangs):
            self._runner = None  # to end it is to wait for the thread that hangs
        self._end_workers()
        with logs.about(run=self.run.name):
            end = "finished" if error is None else f"left by {type(error).__name__}"
            log.info("run %s is %s after %.0f s", self.run.name, end, time.monotonic() - self._begun)

    def _workers(self) -> TaskRunner[Any]:
        """Return the task runner, started when first needed: its processes keep the model from stage to stage."""
        if self._runner is None:
            runner = task_runner(self.run.config)
            self._runner = runner.__enter__()
        return self._runner

    def _end_workers(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.__exit__(None, None, None)
        if self._queued:
            self._queued = False
            end_tasks(self.run.workspace, self.run.name)

    def before(self, kind: str) -> list[str]:
        """Return the kinds of parts that lead to this one, in order."""
        kinds = list(self.run.parts)
        return kinds[: kinds.index(kind)]

    def after(self, kind: str) -> list[str]:
        """Return the kinds of parts that come after this one, in order, but for those that a judge asks for."""
        kinds = list(self.run.parts)
        return [each for each in kinds[kinds.index(kind) + 1 :] if not self.run.parts[each].when_judged]

    def make(self, kind: str) -> Made:
        """Make the missing parts of this kind, and return the complete stage.

        Raises:
            RunIncomplete: parts failed for good.
            RunCancelled: somebody asked for it.
            RunRefused: the parts are complete and cannot be right.
            PartHangs: a part does not come back, in this process.
        """
        parts = self.run.parts[kind]
        standing = parts.standing()
        if not standing.missing:
            return _made(parts, standing, reused=True)
        with making(replace(parts.artifact, name=parts.title)) as is_there:
            self._make_missing(kind, standing)
            made = _made(parts, parts.standing(), reused=False)
            is_there(made.artifact)
        return made

    def _make_missing(self, kind: str, standing: Standing) -> None:
        """Make the missing parts; see `make`."""
        run, execution, parts = self.run, self.run.config.execution, self.run.parts[kind]
        failures = self._given_up(kind)
        todo = [number for number in standing.missing if number not in failures]
        if execution.runner not in ELSEWHERE and others_at_work(run.workspace, run.name):
            todo.reverse()  # another coordinator began at the start: few parts are made twice, where the two meet
        with self._watched(kind, todo) as watch:
            suspects: list[int] = []
            while todo:
                # A pool of processes ends with all that is in flight when one of them dies: which part it died over
                # shows when each is made by itself.
                batch = suspects[:1] or todo
                outcome = self._round(kind, batch, watch)
                failures |= outcome.failures
                if outcome.stopped:
                    self._wait_until_resumed(watch)
                if outcome.worker_lost and len(batch) == 1:
                    failures |= quarantine_deadly(run.workspace, run.name, kind, batch, execution.max_deaths)
                left = [number for number in parts.missing() if number not in failures]
                if outcome.worker_lost:
                    attempts = read_attempts(run.workspace, run.name, kind)
                    suspects = [number for number in left if deaths(attempts.get(number, []))]
                    log.warning(
                        "a worker process died; the %d parts that it may have died over are made one by one",
                        len(suspects),
                    )
                elif not outcome.stopped and left == todo:
                    raise RuntimeError(f"run {run.name}: {kind} {left[0]:05d} was made and is not there")
                else:
                    suspects = [number for number in suspects if number in left]
                todo = left
        if failures:
            failed = [failures[number] for number in sorted(failures)]
            with logs.about(run=run.name, kind=kind):
                log.error("%d of %d parts failed for good", len(failed), parts.count)
            events.announce(events.RUN_INCOMPLETE, run.context, "run", run.name, parts=kind, failed=len(failed))
            raise RunIncomplete(run.workspace, run.name, kind, parts.count, failed)

    def make_unless_incomplete(self, kind: str) -> Made | None:
        """Make the parts as `make` does; return None where parts failed for good."""
        try:
            return self.make(kind)
        except RunIncomplete:
            return None

    def _given_up(self, kind: str) -> dict[int, Failure]:
        """Return the parts that were quarantined before; only `fastgda retry` takes them up again."""
        quarantined = {}
        for number, attempts in read_attempts(self.run.workspace, self.run.name, kind).items():
            if attempts and attempts[-1].state == ShardState.quarantined:
                quarantined[number] = Failure(kind, number, attempts[-1].error_class, attempts[-1].error)
        return quarantined

    def _round(self, kind: str, todo: list[int], watch: Watch) -> Outcome:
        run, execution = self.run, self.run.config.execution
        order = WorkOrder(str(run.workspace.root), run.name, self.assignment, kind, execution)
        coordinate_here(run.name)
        if execution.runner in ELSEWHERE:
            missing = run.parts[kind].missing
            self._queued |= execution.runner == "slurm"
            makers = JobArrays if execution.runner == "slurm" else JobPool
            return makers(run.workspace, order, watch.part_seconds, missing).make(todo, watch.tick)
        workers = self._workers()
        with submission(run.config):
            outcome = run_parts(order, todo, workers, watch.part_seconds, finished=watch.finished, tick=watch.tick)
        if outcome.worker_lost:
            self._end_workers()
        return outcome

    @contextmanager
    def _watched(self, kind: str, todo: list[int]) -> Iterator[Watch]:
        """Keep progress bar, ledger and board up to date while the block runs."""
        run, parts = self.run, self.run.parts[kind]
        rows = sum(map(parts.rows, todo))
        # The ledger is one of score shards.
        ledger = kept_ledger(run.workspace, run.name) if parts is run.scores else nullcontext(lambda: None)
        with (
            logs.about(run=run.name, kind=kind),
            _logged(parts.title, len(todo)),
            self._board,
            ledger as refresh,
            stage(parts.title, rows) as advance,
        ):
            yield Watch(run, parts, set(todo), self.part_seconds.get(kind), advance, refresh, self._board)

    def _wait_until_resumed(self, watch: Watch) -> None:
        """Wait until somebody resumes a paused run.

        Raises:
            RunCancelled: the run is to stop for good.
        """
        run = self.run
        checkpoint()
        if asked(run.workspace, run.name) == RunRequest.pause:
            goes_on = escape(command(run.workspace, f"resume {run.name}"))
            log.info("the run is paused")
            console.print(f"paused: {goes_on} goes on", highlight=False, soft_wrap=True)
        while (wish := asked(run.workspace, run.name)) == RunRequest.pause and not cancellation.requested():
            watch.tick()
            time.sleep(PAUSE_LOOK_SECONDS)
        if wish == RunRequest.cancel or cancellation.requested():
            log.info("the run is cancelled")
            raise RunCancelled(
                f"run {run.name} was cancelled; what is finished is kept, and "
                f"{command(run.workspace, f'retry {run.name}')} goes on"
            )
        log.info("the run goes on")


def _made(parts: Parts, standing: Standing, *, reused: bool) -> Made:
    parts.check()
    return Made(replace(parts.artifact, name=parts.title), standing.seconds, reused)


@contextmanager
def _logged(title: str, parts: int) -> Iterator[None]:
    started = time.monotonic()
    log.info("%s: %d parts to make", title, parts)
    yield
    log.info("%s: over after %.0f s", title, time.monotonic() - started)


@dataclass
class Watch:
    """Follows a stage while it is made."""

    run: Work
    parts: Parts
    left: set[int]
    estimate: float | None
    advance: Callable[[int], None]
    refresh: Callable[[], None]
    board: Board
    looked: float = 0.0
    sample: list[int] = field(default_factory=list)
    measured: float | None = None

    def finished(self, number: int) -> None:
        if number in self.left:
            self.left.discard(number)
            self.advance(self.parts.rows(number))
            self._measure(number)

    def _measure(self, number: int) -> None:
        """Measure what a part takes, from the first few that were made."""
        if len(self.sample) < SAMPLE_PARTS:
            self.sample.append(number)
            manifests = [self.parts.made(each) for each in self.sample]
            self.measured = median_seconds(manifest for manifest in manifests if manifest)

    def part_seconds(self) -> float | None:
        """Return the seconds that one part takes, as far as is known by now: measured, or else estimated."""
        return self.measured if self.measured is not None else self.estimate

    def tick(self) -> bool:
        """Refresh ledger, board and progress; return False when somebody wants the run to stop."""
        self.refresh()
        self.board.update()
        if self.run.config.execution.runner in ELSEWHERE and time.monotonic() - self.looked > 5:
            for number in self.left - set(self.parts.missing()):
                self.finished(number)
            self.looked = time.monotonic()
        return asked(self.run.workspace, self.run.name) is None and not cancellation.requested()


@task(task_run_name="plan", cache_policy=NO_CACHE)
def begin_run(run: Work) -> Coordinator:
    """Write the plan, once, and the assignment of the workers; withdraw a wish to stop that is left over."""
    workspace, name, origin = run.workspace, run.name, flow_run.get_id() or ""
    with logs.about(run=name):
        if not isinstance(run, Preparation) and not workspace.run(name).exists():
            store_plan(run.context, run.score_run, run.artifacts, origin)
            log.info("run %s is planned", name)
        assignment = run.assignment(_generation(workspace, name), origin)
        write_assignment(workspace, assignment)
        withdraw(workspace, name)
        what = ", ".join(f"{parts.count} parts of {kind}" for kind, parts in run.parts.items())
        what = what if isinstance(run, Preparation) else f"{run.artifacts['scores'].rows} pairs"
        log.info("run %s is begun: %s", name, what)
    _tell_of_others(workspace, name, others_at_work(workspace, name))
    hold(str(workspace.root), run, assignment.key)
    return Coordinator(run, assignment.key, _part_seconds(run))


def _tell_of_others(workspace: Workspace, run: str, others: list[Beat]) -> None:
    # Not in the task itself: what a flow calls goes to worker processes with it, and a console cannot be sent.
    if not others:
        return
    at = [f"{beat.worker} at {beat.kind} {beat.number:05d}" for beat in others if beat.kind]
    who = (at or [beat.worker for beat in others])[0]
    console.print(
        f"run {run} is under way elsewhere, too: {who}, of {len(others)} at work; this one begins at the other end, "
        f"and {command(workspace, f'cancel {run}')} stops all",
        highlight=False,
        soft_wrap=True,
    )


def _generation(workspace: Workspace, run: str) -> int:
    try:
        return read_assignment(workspace, run).generation
    except StoreError:
        return 0


def _part_seconds(run: Work) -> dict[str, float]:
    """Estimate the seconds of one part of each kind; empty where no rate is known until the first parts are made."""
    speed = known_rate(run.context)
    if speed is None or isinstance(run, Preparation):
        return {}
    samples, queries = run.artifacts["samples"], run.artifacts["queries"]
    candidates = run.artifacts["candidates"].rows // max(1, queries.rows)
    size = Size(samples.rows, mean_captions(samples.path), queries.rows, candidates)
    per_second = speed.forwards_per_second
    known = (cost for cost in run_costs(run.context, size) if not cost.unknown)
    return {cost.kind: cost.seconds(per_second) / cost.parts for cost in known}
