"""Job arrays in Slurm whose tasks make the parts of a run.

A task takes parts by itself (`tasks/execution/taken_parts.py`), so nothing depends on which task makes which, nor on
how many there are. The coordinator keeps tasks in the queue, as many as there are parts to make and the configuration
allows, tells by an order in the workspace what is wanted, and looks at the queue to learn that a task is gone.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fastgda_core.errors import UsageError
from storage_schemas.commit import input_key, worker_name
from storage_schemas.runs.attempts import Attempt, AttemptLog, ShardState, read_attempts
from storage_schemas.runs.liveness import read_beats
from storage_schemas.runs.orders import (
    Order,
    QueuedTask,
    SlurmQueue,
    read_queue,
    withdraw_order,
    write_order,
    write_queue,
)
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.execution import slurm_commands as slurm
from tasks.execution.array_script import log_folder, written_script
from tasks.execution.fan_out import WorkOrder, quarantine_deadly
from tasks.execution.number_ranges import as_ranges
from tasks.execution.outcomes import Failure, Outcome
from tasks.execution.slurm_commands import SlurmAway, SlurmRefuses, TaskState

LOOK_SECONDS = 1.0  # between two looks at what is there, at least
UNSEEN_SECONDS = 180.0  # after which a task that was submitted and never shown in the queue counts as gone
RETRY_MARGIN = 10.0  # seconds that a task may be late with another try of a part
IDLE_TASKS = 5  # in a row that end badly before they begin a part: then none can do this
LEAVE_SECONDS = 60.0  # in which tasks that are told to end have to: then they are killed
LOG_LINES = 5  # of a task that ended badly, which are shown
log = logging.getLogger("fastgda.execution.slurm")


def job_name(workspace: Workspace, run: str) -> str:
    """Return the name in Slurm of all jobs of a run, by which they are found again."""
    return f"fastgda-{run}-{input_key(str(workspace.root))[:6]}"


@dataclass
class JobArrays:
    """The tasks of one run in Slurm's queue, while parts of one kind are made.

    part_seconds: returns what one part takes, as far as is known by now.
    missing: returns the parts that are not committed at this moment.
    """

    workspace: Workspace
    order: WorkOrder
    part_seconds: Callable[[], float | None]
    missing: Callable[[], list[int]]
    _tasks: dict[str, TaskState] = field(default_factory=dict)  # that wait or run
    _unseen: dict[str, float] = field(default_factory=dict)  # when they were submitted: the queue has not shown them
    _known: dict[int, int] = field(default_factory=dict)  # attempt records of a part, when it was first looked at
    _failing: dict[int, tuple[int, float]] = field(default_factory=dict)  # attempts of a part, and since when so many
    _idle: int = 0
    _told: str = ""
    _away: bool = False

    def __post_init__(self) -> None:
        self._name = job_name(self.workspace, self.order.run)
        self._config = self.order.execution.slurm
        self._logs = log_folder(self.workspace, self.order.run, self._config)

    def make(self, numbers: list[int], tick: Callable[[], bool]) -> Outcome:
        """Keep tasks in the queue until every part is there or failed, or somebody stops the run.

        Raises:
            UsageError: Slurm refuses the tasks, or they end before they begin a part.
        """
        outcome, left = Outcome(), set(numbers)
        self._known = {number: len(attempts) for number, attempts in self._attempts().items()}
        looked = polled = -math.inf
        pause = LOOK_SECONDS
        try:
            while left:
                outcome.stopped |= not tick()
                if outcome.stopped:
                    self._leave()
                    return outcome
                now = time.monotonic()
                poll = now - polled >= self._config.poll_seconds
                if poll or now - looked >= pause:
                    missing = set(self.missing())
                    self._idle = self._idle if left <= missing else 0
                    left &= missing
                    # A listing may take long: as a rule, a twentieth of the time goes into it.
                    looked = time.monotonic()
                    pause = max(LOOK_SECONDS, 20 * (looked - now))
                if left and poll:
                    polled = now
                    self._poll(numbers, left, outcome)
                if left:
                    time.sleep(min(LOOK_SECONDS, self._config.poll_seconds))
        except BaseException:
            end_tasks(self.workspace, self.order.run)
            raise
        self._give_order([])
        if outcome.failures:  # another task may have made a part where one gave it up
            missing = set(self.missing())
            outcome.failures = {number: each for number, each in outcome.failures.items() if number in missing}
        return outcome

    def _poll(self, numbers: Collection[int], left: set[int], outcome: Outcome) -> None:
        """Learn what failed and which tasks ended; let as many tasks wait and run as there are parts for."""
        attempts = self._attempts()
        outcome.failures |= self._failures(attempts, left)
        try:
            ended = self._look()
            for task, state in ended.items():
                outcome.failures |= self._settle(task, state, attempts, left)
            left -= set(outcome.failures)
            if self._idle >= IDLE_TASKS:
                raise UsageError(self._nothing_begun(*list(ended.items())[-1]))
            # What is there already may stay in the order, so that it is seldom replaced.
            self._give_order([number for number in numbers if number not in outcome.failures] if left else [])
            short = min(self._config.tasks, len(left)) - len(self._tasks)
            if short > 0:
                self._submit(short)
            if self._away:
                log.warning("Slurm answers again")
            self._away = False
        except SlurmAway as error:
            if not self._away:
                log.warning("waiting: Slurm is away (%s); tasks under way go on", error)
            self._away = True
        self._tell()

    def _give_order(self, numbers: Collection[int]) -> None:
        order, seconds = self.order, self.order.timeout(self.part_seconds())
        wanted = Order(
            assignment=order.assignment,
            kind=order.kind,
            numbers=as_ranges(numbers),
            given_by=worker_name(),
            timeout=None if seconds is None else 2.0 ** math.ceil(math.log2(seconds)),  # which seldom changes
        )
        write_order(self.workspace, order.run, wanted)

    def _look(self) -> dict[str, TaskState]:
        """Return the tasks that ended since the last look, with how they ended."""
        queue, now = slurm.look(self._name), time.monotonic()
        ended, gone = {}, []
        for task in self._tasks:
            state = queue.get(task)
            if state is not None:
                self._unseen.pop(task, None)
                if state.over:
                    ended[task] = state
            elif now - self._unseen.get(task, -math.inf) > UNSEEN_SECONDS:
                gone.append(task)
        if gone:
            accounts = slurm.accounted(gone)
            ended |= {task: accounts.get(task, TaskState("GONE", "it left the queue")) for task in gone}
        for task in ended:
            del self._tasks[task]
            self._unseen.pop(task, None)
        # Those of a coordinator of this run that died are taken over.
        self._tasks |= {task: state for task, state in queue.items() if not state.over}
        return ended

    def _submit(self, tasks: int) -> None:
        """Submit this many tasks, in as many arrays as the cluster wants them in.

        Raises:
            SlurmRefuses: it takes none, and there are none that could do the work.
        """
        most, config = slurm.most_tasks(), self._config
        script = written_script(self._logs, self._name, config, self.order.location, self.order.run)
        for start in range(0, tasks, most):
            size = min(most, tasks - start)
            # Slurm knows a limit of one array only, so that several share it.
            at_once = None if config.at_once is None else max(1, config.at_once * size // config.tasks)
            try:
                array = slurm.submit(script, size, at_once)
            except SlurmRefuses as error:
                if not self._tasks:
                    raise
                log.warning("Slurm takes no more tasks for now: %s", error)  # as of a limit of jobs a user
                return
            log.info("job array %s of %d tasks is submitted", array, size)
            for number in range(size):
                self._tasks[f"{array}_{number}"] = TaskState("PENDING")
                self._unseen[f"{array}_{number}"] = time.monotonic()

    def _settle(
        self, task: str, state: TaskState, attempts: dict[int, list[Attempt]], left: set[int]
    ) -> dict[int, Failure]:
        """Note the end of a task; return the parts that are given up, as they killed one process too many."""
        log.info("task %s is over: %s %s", task, state.state, state.reason)
        order, at = self.order, _begun_by(self._workers_of(task), attempts) & left
        if state.state == "PREEMPTED":  # which is not the doing of what it was at
            again = AttemptLog(self.workspace, order.run, kind=order.kind)
            for number in at:
                again.record(number, ShardState.pending)
            return {}
        if not at and state.state != "COMPLETED":
            self._idle += 1
        return quarantine_deadly(self.workspace, order.run, order.kind, sorted(at), order.execution.max_deaths)

    def _workers_of(self, task: str) -> set[str]:
        """Return the processes that a task was: several where Slurm started it again."""
        return {beat.worker for beat in read_beats(self.workspace, self.order.run) if beat.slurm == task}

    def _failures(self, attempts: dict[int, list[Attempt]], left: set[int]) -> dict[int, Failure]:
        """Return the parts whose last attempt failed, and of which no task begins another one."""
        failed, now = {}, time.monotonic()
        for number in left & set(attempts):
            new = attempts[number][self._known.get(number, 0) :]
            if not new or new[-1].state != ShardState.failed:
                continue
            count, since = self._failing.get(number, (0, now))
            if count != len(new):
                count, since = self._failing[number] = len(new), now
            tried = sum(attempt.state == ShardState.running for attempt in new)
            execution = self.order.execution
            again_within = execution.retry_delay * 1.5 * 2 ** (tried - 1) + RETRY_MARGIN
            if tried > execution.retries or now - since > again_within:
                failed[number] = Failure(self.order.kind, number, new[-1].error_class, new[-1].error)
        return failed

    def _tell(self) -> None:
        """Write down what is in the queue, and say what tasks wait for where it is something new."""
        tasks = tuple(QueuedTask(task=task, state=each.state, reason=each.reason) for task, each in self._tasks.items())
        queue = SlurmQueue(name=self._name, logs=str(self._logs), at=datetime.now(UTC), tasks=tasks)
        write_queue(self.workspace, self.order.run, queue)
        why = ", ".join(sorted({_plain(task.reason) for task in tasks if task.reason}))
        if tasks and all(task.state == "PENDING" for task in tasks) and why not in ("", self._told):
            self._told = why
            log.warning("waiting: all %d tasks wait in Slurm's queue: %s", len(tasks), why)

    def _nothing_begun(self, task: str, state: TaskState) -> str:
        ended = f"the last, {task}: {state.state} {state.reason}"
        said = [f"{self._idle} tasks in Slurm ended in a row, and no part was made; {ended}"]
        path = self._logs / f"{task}.log"
        if path.exists():
            said.append(f"{path} ends with:")
            said += [f"  {line}" for line in path.read_text(errors="replace").splitlines()[-LOG_LINES:]]
        again = command(self.workspace, f"retry {self.order.run}")
        said.append(
            "if it was the time limit, raise execution.slurm.time or make parts smaller (teacher.shard_samples); else "
            f"mend what it says (execution.slurm.setup, python), then {again}"
        )
        return "\n".join(said)

    def _leave(self) -> None:
        """Take tasks that wait out of the queue, and wait until those that run have left their parts."""
        until, self._tasks = time.monotonic() + LEAVE_SECONDS, {}
        try:
            slurm.call_off(self._name)
            while running := [task for task, state in slurm.look(self._name).items() if not state.over]:
                if time.monotonic() > until:
                    slurm.end(running)
                    break
                time.sleep(LOOK_SECONDS)
        except (SlurmAway, SlurmRefuses) as error:
            log.warning("Slurm does not say whether the run's tasks have ended: %s", error)
        self._tell()

    def _attempts(self) -> dict[int, list[Attempt]]:
        return read_attempts(self.workspace, self.order.run, self.order.kind)


def end_tasks(workspace: Workspace, run: str) -> None:
    """Withdraw the order of a run: no task begins a part any more, and those that run end at their next micro-batch."""
    withdraw_order(workspace, run)
    why = slurm.called_off(job_name(workspace, run))
    if why:
        log.warning("%s", why)
    queue = read_queue(workspace, run)
    if queue is not None and not why:
        write_queue(workspace, run, queue.model_copy(update={"tasks": (), "at": datetime.now(UTC)}))


def _begun_by(workers: Collection[str], attempts: dict[int, list[Attempt]]) -> set[int]:
    """Return the parts that one of these processes began and did not end."""
    last = {number: records[-1] for number, records in attempts.items() if records}
    return {n for n, attempt in last.items() if attempt.state == ShardState.running and attempt.worker in workers}


def _plain(reason: str) -> str:
    """Write Slurm's word for a reason as words: `BadConstraints`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", reason).lower() if reason.isalpha() else reason
