"""The status of a run, from its workspace's files alone: with or without a Prefect server, from any machine."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TypedDict

from fastgda_core.errors import UsageError
from storage_schemas.commit import worker_name
from storage_schemas.errors import StoreError
from storage_schemas.runs.attempts import ShardState, read_attempts
from storage_schemas.runs.ledger import derive, read_run, run_names
from storage_schemas.runs.liveness import (
    BEAT_SECONDS,
    Beat,
    RunRequest,
    asked,
    is_preparation,
    preparation_names,
    process_lives,
    read_assignment,
    read_beats,
)
from storage_schemas.runs.orders import read_queue
from storage_schemas.runs.rivals import read_rivals
from storage_schemas.workspace import Workspace
from tasks.config.execution import ExecutionConfig
from tasks.config.stored import lifted
from tasks.watching.stage_progress import FailedShard, StageProgress, recent_speed, stages_before_scores
from tasks.watching.trust import Trust, trust_in

ALIVE_SECONDS = 60.0  # after its last beat a worker is taken for gone


@dataclass(frozen=True)
class Straggler:
    """A part that its worker is at for much longer than the others took."""

    kind: str
    number: int
    worker: str
    seconds: float
    median: float
    hangs: bool = False  # beyond its time limit, too: it does not come back


@dataclass(frozen=True)
class LeftOut:
    """A training sample that the run could not use."""

    train_id: int
    found_in: str
    reason: str


@dataclass(frozen=True)
class WorkerStatus:
    """A process that works on the run, as of its last sign of life."""

    worker: str
    device: str
    at: str
    part_seconds: float
    parts: int
    rows: int
    device_memory: int
    out_of_memory: int
    seconds_silent: float
    flow_run: str
    slurm: str


class _DoneShard(TypedDict):
    """The fields used here of a ledger row whose shard is done."""

    rows: int
    seconds: float
    finished_at: datetime | None


@dataclass(frozen=True)
class RunStatus:
    """The status of a run: counts are of score shards and their rows; seconds are those of devices.

    stages: those before the scores; failures: of all stages.
    rivals: of its judge, by name: the run that scored it, or why none did.
    slurm: tasks in Slurm's queue, counted by job and by state, as of the coordinator's last look.
    """

    run: str
    workspace: str
    name: str
    teacher: str
    state: str
    wish: str
    created_at: str
    shards: dict[str, int]
    rows: int
    pairs: int
    rows_per_second: float
    seconds_left: float | None
    device_hours: float
    cost: float | None
    currency: str
    failed_attempts: dict[str, int]
    workers: list[WorkerStatus]
    stragglers: list[Straggler]
    failures: list[FailedShard]
    left_out: list[LeftOut]
    trust: Trust
    stages: list[StageProgress]
    rivals: dict[str, str]
    slurm: dict[str, dict[str, int]]

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "warnings": self.trust.warnings}


def run_status(workspace: Workspace, run: str) -> RunStatus:
    """Derive the status of a run from its files.

    Raises:
        UnknownRun: there is no such run; the message names those that there are.
    """
    if is_preparation(workspace, run):
        return _preparation_status(workspace, run)
    execution = _execution_of(workspace, run)
    record = read_run(workspace, run)
    ledger_rows, left_out, _ = derive(workspace, run)
    ledger = ledger_rows.to_pylist()
    states = Counter(str(row["state"]) for row in ledger)
    done: list[_DoneShard] = [row for row in ledger if row["state"] == ShardState.done]
    rows = sum(row["rows"] for row in done)
    now = datetime.now(UTC)
    beats = [beat for beat in read_beats(workspace, run) if _lives(beat, now)]
    speed = _rows_per_second(done, now) if beats else 0.0
    hours = sum(row["seconds"] for row in done) / 3600
    stages, stages_failed = stages_before_scores(workspace, run, now, alive=bool(beats))
    failed = [row for row in ledger if row["state"] in (ShardState.failed, ShardState.quarantined)]
    wish = asked(workspace, run)
    attempts = [attempt for several in read_attempts(workspace, run).values() for attempt in several]
    price = execution.price_per_device_hour
    return RunStatus(
        run=run,
        workspace=str(workspace.root),
        name=record.name,
        teacher=record.teacher,
        state=_state(states, len(ledger), bool(beats), wish, stages),
        wish=wish or "",
        created_at=record.created_at.isoformat(timespec="seconds"),
        shards={state: states.get(state, 0) for state in ShardState},
        rows=rows,
        pairs=record.pairs,
        rows_per_second=speed,
        seconds_left=(record.pairs - rows) / speed if speed and states[ShardState.done] < len(ledger) else None,
        device_hours=hours,
        cost=hours * price if price is not None else None,
        currency=execution.currency,
        failed_attempts=dict(Counter(a.error_class for a in attempts if a.state == ShardState.failed)),
        workers=[_worker(beat, now) for beat in beats],
        stragglers=_stragglers(done, stages, beats, now, execution),
        failures=[
            *stages_failed,
            *(
                FailedShard(r["shard"], r["state"], r["attempts"], r["worker"], r["error_class"], r["error"])
                for r in failed
            ),
        ],
        left_out=[LeftOut(row["train_id"], row["found_in"], row["reason"]) for row in left_out.to_pylist()],
        trust=trust_in(workspace, run),
        stages=stages,
        rivals={
            name: rival.failed.partition("\n")[0] or rival.run for name, rival in read_rivals(workspace, run).items()
        },
        slurm=queue.counts() if (queue := read_queue(workspace, run)) else {},
    )


def _preparation_status(workspace: Workspace, run: str) -> RunStatus:
    """Derive the status of work before a run is planned, which has stages alone."""
    assignment, execution, now = read_assignment(workspace, run), _execution_of(workspace, run), datetime.now(UTC)
    beats = [beat for beat in read_beats(workspace, run) if _lives(beat, now)]
    stages, failures = stages_before_scores(workspace, run, now, alive=bool(beats))
    wish, hours = asked(workspace, run), sum(stage.seconds for stage in stages) / 3600
    done = all(stage.done == stage.parts for stage in stages)
    price = execution.price_per_device_hour
    by_part = [many for stage in stages for many in read_attempts(workspace, run, stage.kind).values()]
    created = datetime.fromtimestamp(workspace.assignment(run).stat().st_mtime, UTC)
    return RunStatus(
        run=run,
        workspace=str(workspace.root),
        name=str(assignment.config.get("name", "")),
        teacher="",
        state="done" if done else _state(Counter(), 1, bool(beats), wish, stages),
        wish=wish or "",
        created_at=created.isoformat(timespec="seconds"),
        shards=dict.fromkeys(ShardState, 0),
        rows=0,
        pairs=0,
        rows_per_second=0.0,
        seconds_left=None,
        device_hours=hours,
        cost=hours * price if price is not None else None,
        currency=execution.currency,
        failed_attempts=dict(Counter(a.error_class for each in by_part for a in each if a.state == ShardState.failed)),
        workers=[_worker(beat, now) for beat in beats],
        stragglers=_stragglers([], stages, beats, now, execution),
        failures=failures,
        left_out=[],
        trust=Trust({}, None, None),
        stages=stages,
        rivals={},
        slurm=queue.counts() if (queue := read_queue(workspace, run)) else {},
    )


def latest_run(workspace: Workspace) -> str:
    """Return what is being prepared now, else the run that was planned last, else what was prepared last.

    Runs of rivals are made for another run and do not count.

    Raises:
        StoreError: there is none.
    """
    prepared, now = preparation_names(workspace), datetime.now(UTC)
    for name in reversed(prepared):
        if any(_lives(beat, now) for beat in read_beats(workspace, name)):
            return name
    every = [read_run(workspace, run) for run in run_names(workspace)]
    records = [record for record in every if record.config.get("publish") != "never"]
    if not records and prepared:
        return prepared[-1]
    if not records:
        raise StoreError(f"{workspace.root} has no run yet: `fastgda curate CONFIG` plans one")
    return max(records, key=lambda record: record.created_at).run


def _execution_of(workspace: Workspace, run: str) -> ExecutionConfig:
    """Return how the run's last coordinator carried it out; the defaults where that cannot be read."""
    try:
        return lifted(ExecutionConfig, read_assignment(workspace, run).execution, f"run {run}")[0]
    except (StoreError, UsageError):  # imported, or another release's
        return ExecutionConfig()


def _state(states: Counter[str], shards: int, alive: bool, wish: RunRequest | None, stages: list[StageProgress]) -> str:
    if states[ShardState.done] == shards:
        return "done"
    if wish is not None:
        return "paused" if wish == RunRequest.pause else "cancelled"
    if alive:
        return "running"
    if states[ShardState.failed] or states[ShardState.quarantined] or any(stage.failed for stage in stages):
        return "incomplete"
    return "stopped" if states[ShardState.done] or any(stage.done for stage in stages) else "planned"


def _rows_per_second(done: list[_DoneShard], now: datetime) -> float:
    ends = [(row["finished_at"], row["rows"], row["seconds"]) for row in done if row["finished_at"] is not None]
    return recent_speed(ends, now)


def _lives(beat: Beat, now: datetime) -> bool:
    """Return whether the process behind a beat may still be at work."""
    return not beat.ended and _seconds_since(beat, now) < ALIVE_SECONDS and process_lives(beat.worker)


def others_at_work(workspace: Workspace, run: str) -> list[Beat]:
    """Return the signs of life of other processes than this one that make parts of the run."""
    now = datetime.now(UTC)
    return [beat for beat in read_beats(workspace, run) if beat.worker != worker_name() and _lives(beat, now)]


def _seconds_since(beat: Beat, now: datetime) -> float:
    return (now - beat.at).total_seconds()


def _worker(beat: Beat, now: datetime) -> WorkerStatus:
    return WorkerStatus(
        worker=beat.worker,
        device=beat.device,
        at=f"{beat.kind} {beat.number:05d}" if beat.kind else "",
        part_seconds=round(beat.part_seconds, 1),
        parts=beat.parts,
        rows=beat.rows,
        device_memory=beat.device_memory,
        out_of_memory=beat.out_of_memory,
        seconds_silent=round(_seconds_since(beat, now), 1),
        flow_run=beat.job,
        slurm=beat.slurm,
    )


def _stragglers(
    done: list[_DoneShard],
    stages: list[StageProgress],
    beats: list[Beat],
    now: datetime,
    execution: ExecutionConfig,
) -> list[Straggler]:
    """Return the parts under way that take much longer than the median of the finished parts of their kind."""
    medians = {stage.kind: (stage.done, stage.median) for stage in stages if stage.median is not None}
    if done:
        medians["scores"] = len(done), statistics.median(row["seconds"] for row in done)
    stragglers = []
    for beat in beats:
        count, median = medians.get(beat.kind, (0, None))
        if median is None:
            continue
        seconds = beat.part_seconds + _seconds_since(beat, now)
        hangs = seconds > max(execution.timeout_floor, execution.timeout_factor * median)
        slow = count >= 5 and seconds > max(execution.straggler_factor * median, 2 * BEAT_SECONDS)
        if slow or hangs:
            stragglers.append(Straggler(beat.kind, beat.number, beat.worker, seconds, median, hangs))
    return stragglers
