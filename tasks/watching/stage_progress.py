"""The progress of a run's stages before the scores, from its assignment, manifests and attempt records alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from storage_schemas.commit import Manifest, read_manifest
from storage_schemas.errors import StoreError
from storage_schemas.listings import folder_manifests
from storage_schemas.runs.attempts import Attempt, ShardState, read_attempts
from storage_schemas.runs.liveness import PartsRecord, read_assignment
from storage_schemas.sample_plan import KIND as SAMPLES
from storage_schemas.sample_plan import committed_sample_parts, read_sample_plan
from storage_schemas.workspace import Workspace

RECENT = timedelta(minutes=10)  # speed is that of the last minutes


@dataclass(frozen=True)
class FailedShard:
    """A part that is failed or quarantined, and why."""

    shard: int
    state: str
    attempts: int
    worker: str
    error_class: str
    error: str
    kind: str = "scores"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.shard:05d}"


@dataclass(frozen=True)
class StageProgress:
    """A stage that leads to the scores, in parts; its seconds are those of devices."""

    kind: str
    parts: int
    done: int
    failed: int
    seconds: float
    median: float | None
    seconds_left: float | None


def stages_before_scores(
    workspace: Workspace, run: str, now: datetime, *, alive: bool
) -> tuple[list[StageProgress], list[FailedShard]]:
    """Return how far each stage is, in the order in which they are made, and what failed in them.

    Empty for a run of a release that did not write down how many parts a stage has, and for one that was imported.

    Args:
        alive: whether anybody works on the run; else no time is left to tell.
    """
    try:
        stages = read_assignment(workspace, run).stages
    except StoreError:  # imported
        return [], []
    progress, failures = [], []
    for kind, record in stages.items():
        if kind == "scores" or not record.parts:
            continue
        done = dict(_done(workspace, kind, record))
        failed = list(_failed(kind, read_attempts(workspace, run, kind), done))
        seconds = [manifest.seconds for manifest in done.values()]
        speed = recent_speed([(m.committed_at, 1, m.seconds) for m in done.values() if m.committed_at], now)
        left = record.parts - len(done)
        progress.append(
            StageProgress(
                kind,
                record.parts,
                len(done),
                len(failed),
                sum(seconds),
                statistics.median(seconds) if seconds else None,
                left / speed if alive and left and speed else None,
            )
        )
        failures += failed
    return progress, failures


def recent_speed(ends: list[tuple[datetime, int, float]], now: datetime) -> float:
    """Return how many were finished a second in the last minutes, from (when, how many, in how long).

    Work that began within these minutes is divided by the time since it began.
    """
    recent = [(at, count, seconds) for at, count, seconds in ends if now - at < RECENT]
    if not recent:
        return 0.0
    first = min(at - timedelta(seconds=seconds) for at, _, seconds in recent)
    return sum(count for _, count, _ in recent) / max((now - max(first, now - RECENT)).total_seconds(), 1e-3)


def _done(workspace: Workspace, kind: str, record: PartsRecord) -> Iterator[tuple[int, Manifest]]:
    """Yield the committed parts of a stage by number; the curvature is one file and no folder."""
    path = workspace.file(record.path)
    if kind == SAMPLES and (plan := read_sample_plan(workspace, record.key)) is not None:
        yield from committed_sample_parts(workspace, plan).items()
        return
    if record.parts == 1 and (alone := read_manifest(path)) is not None:
        manifests = {path: alone}
    else:
        manifests = folder_manifests(path) if not path.is_file() else {}
    for each, manifest in manifests.items():
        name = each.name.split(".")[0].removeprefix("part-")
        if manifest.input_key == record.key:
            yield int(name) if name.isdigit() else 0, manifest


def _failed(kind: str, attempts: dict[int, list[Attempt]], done: dict[int, Manifest]) -> Iterator[FailedShard]:
    for number, of_part in sorted(attempts.items()):
        last = of_part[-1] if of_part else None
        if last is None or number in done or last.state not in (ShardState.failed, ShardState.quarantined):
            continue
        tries = sum(attempt.state == ShardState.running for attempt in of_part)
        yield FailedShard(number, last.state, tries, last.worker, last.error_class, last.error, kind)
