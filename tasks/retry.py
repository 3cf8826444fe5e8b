"""Take up again what a run gave up."""

from __future__ import annotations

from datetime import UTC, datetime

from prefect import task
from prefect.cache_policies import NO_CACHE

from fastgda_core.errors import UsageError
from storage_schemas.attempts import AttemptLog, ShardState, read_attempts
from storage_schemas.commit import manifest_path
from storage_schemas.files import move, remove
from storage_schemas.ledger import quarantined_parts, read_ledger, read_run
from storage_schemas.liveness import read_assignment, withdraw, write_assignment
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.config import PipelineConfig
from tasks.number_ranges import from_ranges
from tasks.run_inputs import KINDS


def config_of(location: str, run: str) -> PipelineConfig:
    """The configuration of a run, for the folder given: it may be mounted elsewhere than when the run was planned.

    Raises:
        UsageError: it was imported, and no teacher of this workspace scored it.
    """
    workspace = Workspace.at(location)
    record = read_run(workspace, run)
    if "teacher" not in record.config:
        raise UsageError(f"run {run} was imported: its scores cannot be made again here; import its file once more")
    found = read_assignment(workspace, run)
    # What earlier releases did not do they do not say; with today's defaults theirs would be other runs.
    absent = {"features": {"centre": False}, "curvature": {"importance": False}, "queries": {"twins": 0}}
    sections = {name: {**before, **found.config.get(name, {})} for name, before in absent.items()}
    return PipelineConfig.model_validate(
        {**found.config, **sections, "execution": found.execution, "workspace": str(workspace.root)}
    )


@task(task_run_name="release", cache_policy=NO_CACHE)
def release(location: str, run: str, shards: str = "") -> int:
    """Make failed and quarantined parts pending again, and throw away parts that left samples out.

    Args:
        shards: numbers of the score shards meant, as `0-2,5`; all where empty.

    Returns:
        How many parts will be made again.

    Raises:
        UsageError: a shard named is not one of those.
    """
    workspace = Workspace.at(location)
    chosen = set(from_ranges(shards))
    short = quarantined_parts(workspace, run)
    given_up = _given_up(workspace, run)
    if chosen:
        _check(workspace, run, chosen)
        given_up = {"scores": given_up.get("scores", set()) & chosen}
        short = {
            "scores": [
                path for number in chosen if (path := workspace.score_shard(run, number)) in short.get("scores", [])
            ]
        }
    folder = workspace.quarantine(f"{datetime.now(UTC):%Y%m%dT%H%M%S}")
    for paths in short.values():
        for path in paths:
            # The file first: without it the manifest counts for nothing, and a crash in between is mended by a retry.
            move(path, folder / workspace.relative(path))
            remove(manifest_path(path))
    for kind, numbers in given_up.items():
        log = AttemptLog(workspace, run, kind=kind)
        for number in sorted(numbers):
            log.record(number, ShardState.pending)
    withdraw(workspace, run)
    if any(short.values()):
        found = read_assignment(workspace, run)
        write_assignment(workspace, found.model_copy(update={"generation": found.generation + 1}))
    return sum(map(len, short.values())) + sum(map(len, given_up.values()))


def _given_up(workspace: Workspace, run: str) -> dict[str, set[int]]:
    """Parts whose last attempt record says failed or quarantined, by kind."""
    found: dict[str, set[int]] = {}
    for kind in KINDS:
        for number, attempts in read_attempts(workspace, run, kind).items():
            if attempts and attempts[-1].state in (ShardState.failed, ShardState.quarantined):
                found.setdefault(kind, set()).add(number)
    return found


def _check(workspace: Workspace, run: str, chosen: set[int]) -> None:
    ledger = read_ledger(workspace, run)
    known = set(ledger["shard"].to_pylist())
    if chosen - known:
        raise UsageError(
            f"run {run} has no shard {min(chosen - known)}: it has {len(known)}; "
            f"{command(workspace, f'status {run}')} names those that failed"
        )
