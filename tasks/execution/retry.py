"""Take up again what a run gave up."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from itertools import chain

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas.commit import manifest_path
from storage_schemas.errors import StoreError
from storage_schemas.files import move, remove
from storage_schemas.runs.attempts import AttemptLog, ShardState, read_attempts
from storage_schemas.runs.ledger import quarantined_parts
from storage_schemas.runs.liveness import read_assignment, withdraw, write_assignment
from storage_schemas.workspace import Workspace
from tasks import logs
from tasks.execution.number_ranges import chosen_shards

log = logging.getLogger("fastgda.execution")


@task(task_run_name="release", cache_policy=NO_CACHE)
def release(location: str, run: str, shards: str | None = None) -> int:
    """Make failed and quarantined parts pending again, and throw away parts that left samples out.

    Args:
        shards: numbers of the score shards meant, as `0-2,5`; None: all.

    Returns:
        How many parts will be made again.

    Raises:
        UsageError: a named shard is not one of the run's.
    """
    workspace = Workspace.at(location)
    named = chosen_shards(workspace, run, shards)
    short = quarantined_parts(workspace, run)
    given_up = _given_up(workspace, run)
    if named is not None:
        given_up = {"scores": given_up.get("scores", set()) & named}
        short = {
            "scores": [
                path for number in named if (path := workspace.score_shard(run, number)) in short.get("scores", [])
            ]
        }
    folder = workspace.quarantine(f"{datetime.now(UTC):%Y%m%dT%H%M%S}")
    to_be_mended = set(chain.from_iterable(short.values()))
    for path in to_be_mended:
        # The file first: without it the manifest counts for nothing, and a crash in between is mended by a retry.
        move(path, folder / workspace.relative(path))
        remove(manifest_path(path))
    for kind, numbers in given_up.items():
        attempts = AttemptLog(workspace, run, kind=kind)
        for number in sorted(numbers):
            attempts.record(number, ShardState.pending)
    withdraw(workspace, run)
    if to_be_mended:
        assignment = read_assignment(workspace, run)
        write_assignment(workspace, assignment.model_copy(update={"generation": assignment.generation + 1}))
    count = len(to_be_mended) + sum(map(len, given_up.values()))
    with logs.about(run=run):
        log.info("%d parts that failed or left samples out are to be made again", count)
    return count


def _given_up(workspace: Workspace, run: str) -> dict[str, set[int]]:
    """Return the parts whose last attempt record says failed or quarantined, by kind."""
    given_up: dict[str, set[int]] = {}
    try:
        kinds = list(read_assignment(workspace, run).stages)
    except StoreError:  # imported
        kinds = ["scores"]
    for kind in kinds:
        for number, attempts in read_attempts(workspace, run, kind).items():
            if attempts and attempts[-1].state in (ShardState.failed, ShardState.quarantined):
                given_up.setdefault(kind, set()).add(number)
    return given_up
