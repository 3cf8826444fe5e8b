"""Make the missing parts of a run: one Prefect task run a part, never more than a window of them under way.

A task returns a reference to a committed file, never the file's content. The task runner decides where a part is made.
The manifests and attempt records of the workspace decide what is missing, failed or lost.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.states import Cancelled
from prefect.task_runners import TaskRunner
from prefect.tasks import Task, exponential_backoff

from fastgda_core.errors import Remedy, Stopped, device_lost, remedy
from fastgda_core.interruption import stopping
from storage_schemas.runs.attempts import AttemptLog, ShardState, deaths, read_attempts
from storage_schemas.workspace import Workspace
from tasks import logs
from tasks.config.execution import ExecutionConfig
from tasks.devices import hold_device
from tasks.execution.outcomes import Failure, Outcome
from tasks.execution.worker import coordinator_here, raise_if_hung, worker_on
from tasks.teaching.run import load_run

TICK_SECONDS = 1.0
log = logging.getLogger("fastgda.execution.parts")


@dataclass(frozen=True)
class PartReference:
    """A committed part, by its path and sha256."""

    kind: str
    number: int
    path: str
    sha256: str
    rows: int
    seconds: float


def _is_transient(_task: Task[..., object], _run: TaskRun, state: State[object]) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and may_pass(error)


def may_pass(error: BaseException) -> bool:
    """Return whether another attempt of this process may succeed where one ended with this error."""
    return remedy(error) is Remedy.retry and not device_lost(error)


@task(
    name="make part",
    task_run_name="{kind} {number:05d}",
    cache_policy=NO_CACHE,
    retry_jitter_factor=0.5,
    retry_condition_fn=_is_transient,
)
def make_part(
    location: str, run: str, assignment: str, kind: str, number: int, timeout: float | None
) -> PartReference | State[None]:
    """Make and commit one part; a part that is there already costs nothing."""
    logs.set_up_once()
    with logs.about(run=run, kind=kind, part=number):
        try:
            return part_made(location, run, assignment, kind, number, timeout)
        except Exception as error:
            context = TaskRunContext.get()
            attempt, attempts = (context.task_run.run_count, 1 + context.task.retries) if context else (1, 1)
            log_failure(kind, number, error, attempt, attempts)
            raise


def log_failure(kind: str, number: int, error: Exception, attempt: int, attempts: int) -> None:
    """Log that an attempt at a part failed, of those that there may be."""
    why, trace = f"{type(error).__name__}: {error}", log.isEnabledFor(logging.DEBUG)
    if attempt < attempts and may_pass(error):
        log.warning("%s %05d is tried again after attempt %d of %d: %s", kind, number, attempt, attempts, why)
    else:
        log.error("%s %05d failed for good at attempt %d: %s", kind, number, attempt, why, exc_info=trace)


def part_made(
    location: str, run: str, assignment: str, kind: str, number: int, timeout: float | None
) -> PartReference | State[None]:
    """Make one part, if it is not there, in this process; a state where somebody stopped it."""
    if stopping():  # before the model is loaded for nothing
        return Cancelled(message="stopped as somebody asked")
    if not coordinator_here(run):
        hold_device()
    loaded = load_run(location, run, assignment)
    parts = loaded.parts[kind]
    manifest = parts.made(number)
    if manifest is None:
        worker = worker_on(location, run)
        try:
            with worker.at_work(loaded.context, kind, number, timeout):
                log.debug("%s %05d is begun on %s", kind, number, loaded.context.device)
                manifest = parts.make(number)
        except Stopped:
            log.info("%s %05d is left, as the run is to stop", kind, number)
            return Cancelled(message="stopped as somebody asked")
        worker.finished(manifest)
        left_out = len(manifest.quarantined)
        made = "%s %05d is made: %d rows in %.1f s, %d samples left out"
        log.debug(made, kind, number, manifest.rows, manifest.seconds, left_out)
    relative = loaded.workspace.relative(parts.path(number))
    return PartReference(kind, number, relative, manifest.sha256, manifest.rows, manifest.seconds)


@dataclass(frozen=True)
class WorkOrder:
    """An order to make parts of one kind of a run, and how patiently.

    location: folder or URL of the workspace.
    assignment: key of the run's assignment.
    """

    location: str
    run: str
    assignment: str
    kind: str
    execution: ExecutionConfig

    def timeout(self, part_seconds: float | None) -> float | None:
        """Return the seconds that one part may take, given what a part usually takes; None is no limit."""
        if part_seconds is None:
            return None
        return max(self.execution.timeout_floor, self.execution.timeout_factor * part_seconds)


def run_parts(
    order: WorkOrder,
    numbers: Iterable[int],
    runner: TaskRunner[Any],
    part_seconds: Callable[[], float | None],
    *,
    finished: Callable[[int], None] = lambda number: None,
    tick: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Make these parts with a task runner, inside a flow run.

    Args:
        runner: entered already.
        part_seconds: returns what one part takes, as far as is known.
        finished: called with the number of each part that is there.
        tick: called every second or so; False stops.

    Raises:
        PartHangs: a part hangs in a thread of this process, which has to end.
    """
    execution = order.execution
    delays = [execution.retry_delay * factor for factor in exponential_backoff(1)(execution.retries)]
    patient = make_part.with_options(retries=execution.retries, retry_delay_seconds=delays or 0)
    place = {
        "location": order.location,
        "run": order.run,
        "assignment": order.assignment,
        "kind": order.kind,
    }
    outcome = Outcome()
    waiting = iter(numbers)
    in_flight: dict[PrefectFuture[PartReference], int] = {}
    done: queue.SimpleQueue[PrefectFuture[PartReference]] = queue.SimpleQueue()
    ticked = time.monotonic()
    try:
        while True:
            going_on = not outcome.stopped and not outcome.worker_lost
            while going_on and len(in_flight) < execution.window:
                number = next(waiting, None)
                if number is None:
                    break
                timeout = order.timeout(part_seconds())
                future = runner.submit(patient, {**place, "number": number, "timeout": timeout})
                in_flight[future] = number
                future.add_done_callback(done.put)
            if not in_flight:
                return outcome
            if time.monotonic() - ticked >= TICK_SECONDS:
                ticked = time.monotonic()
                outcome.stopped |= not tick()
            try:
                future = done.get(timeout=TICK_SECONDS)
            except queue.Empty:
                raise_if_hung(order.run, order.timeout(part_seconds()))
                continue
            _take(outcome, future, order.kind, in_flight.pop(future), finished)
    except BaseException:
        worker_on(order.location, order.run).leave()
        raise


def _take(
    outcome: Outcome,
    future: PrefectFuture[PartReference],
    kind: str,
    number: int,
    finished: Callable[[int], None],
) -> None:
    """Note in the outcome how one part ended."""
    state: State[object] | None = None
    result: object = None
    try:
        future.wait()
        state = future.state
        # The state alone where all is well: to resolve the result would take longer than a small part.
        if not state.is_completed():
            result = future.result(raise_on_failure=False)
    except Exception as error:  # a runner whose process died has no state to ask
        result = error
    if state is not None and state.is_completed():
        finished(number)
    elif isinstance(result, BrokenExecutor):
        outcome.worker_lost = True
    elif isinstance(result, RuntimeError) and device_lost(result):
        raise DeviceLost(f"this process cannot use its device any more: {result}") from result
    elif isinstance(result, BaseException):
        if state is not None and state.is_cancelled():
            outcome.stopped = True
        else:
            outcome.failures[number] = Failure.of(kind, number, result)
    else:
        outcome.stopped = True


def end_of_job(order: WorkOrder, outcome: Outcome) -> str:
    """Return what a job's flow run says at its end.

    Raises:
        RuntimeError: parts failed.
    """
    worker_on(order.location, order.run).end()
    if outcome.failures:
        raise RuntimeError("\n".join(str(outcome.failures[number]) for number in sorted(outcome.failures)))
    return "stopped as somebody asked" if outcome.stopped else "all there"


class DeviceLost(RuntimeError):
    """The device failed under the process that coordinates the run: that process has to be started again."""


class WorkerLost(RuntimeError):
    """Worker processes died over a part: its data, or its size, may be what kills them."""


def quarantine_deadly(
    workspace: Workspace, run: str, kind: str, numbers: Iterable[int], max_deaths: int
) -> dict[int, Failure]:
    """Quarantine those of some unfinished parts over which too many worker processes died, and return them."""
    attempts, attempt_log = read_attempts(workspace, run, kind), AttemptLog(workspace, run, kind=kind)
    quarantined = {}
    for number in numbers:
        count = deaths(attempts.get(number, []))
        if count >= max_deaths:
            error = WorkerLost(
                f"{count} worker processes died while they made it: it is not tried again before `fastgda retry`"
            )
            attempt_log.record(number, ShardState.quarantined, error=error)
            with logs.about(run=run, kind=kind, part=number):
                log.warning("%s %05d is quarantined: %s", kind, number, error)
            quarantined[number] = Failure.of(kind, number, error)
    return quarantined
