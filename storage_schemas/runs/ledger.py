"""The ledger of a run: which score shards are pending, running, done, failed or quarantined.

Each file has one kind of writer, so that no lock is ever held and no reader is ever locked out:

- a worker writes the Parquet file and the manifest of the shards that it finished, and one file of attempt records
  that is its own (`runs/<run>/attempts/<worker>.jsonl`);
- the coordinator of a run writes the plan, once, and replaces `runs/<run>/shards.parquet`, this ledger, by rename;
- a publisher creates `published/<number>.json`, which fails where another publisher did, and replaces `current.json`
  and `catalog.duckdb` by rename.

DuckDB lets one process at a time open a file that it may write, and no other process, even one that only reads, may
open it meanwhile (measured on 2.0.0). So nobody opens a published DuckDB file for writing: SQL reads Parquet through
views in memory.

The ledger holds nothing of its own: `read_ledger` derives it from plan, manifests and attempt records, and
`rebuild_ledgers` (`fastgda ledger rebuild`) writes it anew. Without the attempt records a shard that failed is
pending again, and nothing else is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

import pyarrow as pa

from storage_schemas import tables
from storage_schemas.commit import Manifest
from storage_schemas.errors import StoreError
from storage_schemas.files import (
    AnyPath,
    is_there,
    matching,
    read_if_there,
    read_whole,
    remove,
    write_atomically,
    write_changed,
)
from storage_schemas.listings import Listing, folder_manifests, list_folder, listed_manifest, listed_manifests
from storage_schemas.runs.attempts import Attempt, ShardState, read_attempts
from storage_schemas.runs.liveness import is_preparation, process_lives, read_assignment
from storage_schemas.runs.records import Compaction, Labelling, RunRecord, UnknownRun
from storage_schemas.workspace import Workspace

LEDGER_SECONDS = 5.0  # between two refreshes of a running run's ledger, at least


def write_plan(workspace: Workspace, record: RunRecord, shards: pa.Table, queries: pa.Table) -> None:
    """Store what a run will do, once: a run that is planned already is left as it is.

    Args:
        shards: rows of `tables.PLAN_SHARDS`.
        queries: rows of `tables.PLAN_QUERIES`.
    """
    path = workspace.run(record.run)
    if path.exists():
        return
    write_atomically(workspace.plan_shards(record.run), tables.PLAN_SHARDS.encode(shards, {}))
    write_atomically(workspace.plan_queries(record.run), tables.PLAN_QUERIES.encode(queries, {}))
    write_atomically(path, record.model_dump_json(indent=2).encode() + b"\n")


def read_run(workspace: Workspace, run: str) -> RunRecord:
    """Read the record of a run.

    Raises:
        UnknownRun: there is no such run; the message names those that were planned last.
    """
    try:
        return RunRecord.model_validate_json(read_whole(workspace.run(run)))
    except (FileNotFoundError, NotADirectoryError):
        planned = sorted(map(partial(read_run, workspace), run_names(workspace)), key=lambda record: record.created_at)
        known = ", ".join(record.run for record in planned[-5:]) or "none"
        raise UnknownRun(f"{workspace.root} has no run {run}; it has: {known}") from None


def check_known(workspace: Workspace, run: str) -> None:
    """Check that there is a run or preparation of this name.

    Raises:
        UnknownRun: there is none.
    """
    if not is_preparation(workspace, run):
        read_run(workspace, run)


def run_names(workspace: Workspace) -> list[str]:
    """Return all planned runs, by name."""
    return [folder.name for folder in matching(workspace.runs, "*") if (folder / "run.json").exists()]


def published_versions(workspace: Workspace) -> list[int]:
    """Return the numbers of what was published, ascending; the last is what readers see."""
    names = [path.stem for path in matching(workspace.root / "published", "*.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def read_compaction(workspace: Workspace, run: str) -> Compaction | None:
    """Read the list of the run's large files; None where it was not compacted."""
    content = read_if_there(workspace.compaction(run))
    return None if content is None else Compaction.model_validate_json(content)


def read_labelling(workspace: Workspace, run: str) -> Labelling:
    """Read the run's current labelling."""
    content = read_if_there(workspace.labelling(run))
    return Labelling() if content is None else Labelling.model_validate_json(content)


def write_labelling(workspace: Workspace, run: str, labelling: Labelling) -> None:
    """Make this the run's labelling, by which rank labels are made from the next compaction on."""
    if read_labelling(workspace, run) != labelling:
        write_atomically(workspace.labelling(run), labelling.model_dump_json(indent=2).encode() + b"\n")


def read_ledger(workspace: Workspace, run: str) -> pa.Table:
    """Derive the state of every planned shard, as rows of `tables.SHARDS`, from plan, manifests and attempts.

    Raises:
        UnknownRun: there is no such run.
    """
    return derive(workspace, run).ledger


def ledger_as_written(workspace: Workspace, run: str) -> pa.Table:
    """Read the ledger as its coordinator last wrote it, which costs one small file; derive it where there is none."""
    path = workspace.ledger(run)
    return tables.read(path, tables.SHARDS) if path.exists() else read_ledger(workspace, run)


def write_ledger(workspace: Workspace, run: str) -> pa.Table:
    """Derive the ledger of a run and put it where SQL looks, with the samples that were left out beside it."""
    derived = derive(workspace, run)
    put_ledger(workspace, run, derived)
    return derived.ledger


def put_ledger(workspace: Workspace, run: str, derived: Derived) -> None:
    """Put the ledger of a run where SQL looks, with the samples that were left out beside it."""
    write_changed(workspace.ledger(run), tables.SHARDS.encode(derived.ledger, {}).to_pybytes())
    path = workspace.quarantined_samples(run)
    if derived.left_out.num_rows:
        write_changed(path, tables.QUARANTINED_SAMPLES.encode(derived.left_out, {}).to_pybytes())
    elif is_there(path):
        remove(path)


def quarantined_parts(workspace: Workspace, run: str) -> dict[str, list[AnyPath]]:
    """Return the committed files that left samples out, by kind: to be made again once the samples are mended."""
    found: dict[str, list[AnyPath]] = {}
    for kind, folder in _folders(workspace, run).items():
        for path, manifest in folder_manifests(folder).items():
            if manifest.quarantined:
                found.setdefault(kind, []).append(path)
    return found


class Derived(NamedTuple):
    """The facts that a run's files tell at one moment."""

    ledger: pa.Table  # rows of `tables.SHARDS`
    left_out: pa.Table  # samples, rows of `tables.QUARANTINED_SAMPLES`
    scores: dict[AnyPath, Manifest]  # of score shards, by their path


def derive(workspace: Workspace, run: str) -> Derived:
    """Derive the ledger and what goes with it, listing each folder once."""
    read_run(workspace, run)
    plan = tables.read(workspace.plan_shards(run), tables.PLAN_SHARDS).to_pylist()
    attempts = read_attempts(workspace, run)
    listing = list_folder(workspace.scores(run))
    held = _held_by_parts(workspace, run)
    manifests = {
        kind: listed_manifests(folder, listing if kind == "scores" else list_folder(folder))
        for kind, folder in _folders(workspace, run).items()
    }
    rows = [_ledger_row(workspace, run, planned, attempts.get(planned["shard"], []), listing, held) for planned in plan]
    reasons: dict[int, tuple[str, str]] = {}
    for kind, of_kind in manifests.items():
        for manifest in of_kind.values():
            for train_id, reason in manifest.quarantined.items():
                reasons.setdefault(train_id, (kind, reason))
    left_out = [
        {"run": run, "train_id": train_id, "found_in": kind, "reason": reason}
        for train_id, (kind, reason) in sorted(reasons.items())
    ]
    return Derived(
        pa.Table.from_pylist(rows, schema=tables.SHARDS.schema),
        pa.Table.from_pylist(left_out, schema=tables.QUARANTINED_SAMPLES.schema),
        manifests["scores"],
    )


def _folders(workspace: Workspace, run: str) -> dict[str, AnyPath]:
    """Return the folders of the run's parts, in the order of making; a sample may be left out of any of them."""
    try:
        stages = read_assignment(workspace, run).stages
    except StoreError:  # imported
        stages = {}
    # A stage that is one file, whose path has a suffix, leaves no samples out.
    folders = {kind: workspace.file(each.path) for kind, each in stages.items() if not PurePath(each.path).suffix}
    return {**folders, "scores": workspace.scores(run)}


@contextmanager
def kept_ledger(workspace: Workspace, run: str) -> Iterator[Callable[[], None]]:
    """Keep a run's ledger up to date while its coordinator works in the block.

    The ledger is written at the start and, however the block ends, at the end. In between it is written when the
    yielded function is called and the last time is long enough ago that writing costs a twentieth of the time at most.
    """
    due = 0.0

    def refresh(now: bool = False) -> None:
        nonlocal due
        started = time.monotonic()
        if now or started >= due:
            write_ledger(workspace, run)
            ended = time.monotonic()
            due = ended + max(LEDGER_SECONDS, 20 * (ended - started))

    refresh()
    try:
        yield refresh
    finally:
        refresh(now=True)


def rebuild_ledgers(workspace: Workspace) -> dict[str, int]:
    """Write the ledger of every run anew; return the number of shards by run."""
    return {run: write_ledger(workspace, run).num_rows for run in run_names(workspace)}


def done_shards(workspace: Workspace, run: str) -> set[int]:
    """Return the numbers of the shards whose rows are committed."""
    ledger = read_ledger(workspace, run).to_pydict()
    return {n for n, state in zip(ledger["shard"], ledger["state"], strict=True) if state == ShardState.done}


def _ledger_row(
    workspace: Workspace,
    run: str,
    planned: dict[str, Any],
    attempts: list[Attempt],
    listing: Listing,
    held: set[int],
) -> dict[str, object]:
    shard = planned["shard"]
    path = workspace.score_shard(run, shard)
    manifest = _manifest_of(path, listing, planned["input_key"])
    last = attempts[-1] if attempts else None
    starts = sum(attempt.state == ShardState.running for attempt in attempts)
    row: dict[str, object] = {
        "run": run,
        "shard": shard,
        "attempts": starts,
        "worker": last.worker if last else "",
        "device": last.device if last else "",
        "error_class": "",
        "error": "",
        "seconds": last.seconds if last else 0.0,
        "pairs": planned["pairs"],
        "rows": 0,
        "finished_at": last.at if last and last.state != ShardState.running else None,
        "path": workspace.relative(path),
    }
    if manifest is not None and (path.name in listing or planned["query_block"] in held):
        return row | {
            "state": ShardState.done,
            "attempts": max(1, starts),
            "worker": manifest.worker,
            "device": manifest.device,
            "seconds": manifest.seconds,
            "rows": manifest.rows,
            "finished_at": manifest.committed_at,
        }
    if last is None:
        return row | {"state": ShardState.pending}
    if last.state == ShardState.running:
        return row | {"state": ShardState.running if process_lives(last.worker) else ShardState.pending}
    return row | {"state": last.state, "error_class": last.error_class, "error": last.error}


def _manifest_of(path: AnyPath, listing: Listing, key: str) -> Manifest | None:
    """Return the shard's manifest, unless it is of other work or of another file than the one that is there."""
    manifest = listed_manifest(path, listing)
    if manifest is None or manifest.input_key != key:
        return None
    return manifest if path.name not in listing or listing[path.name].size == manifest.size else None


def _held_by_parts(workspace: Workspace, run: str) -> set[int]:
    """Return the blocks of queries all of whose rows are in the run's large files: their shards' files may be gone."""
    compaction = read_compaction(workspace, run)
    if compaction is None:
        return set()
    whole = [part for part in compaction.parts if workspace.file(part.path).exists()]
    queries = tables.read(workspace.plan_queries(run), tables.PLAN_QUERIES).to_pydict()
    held, open_blocks = set(queries["query_block"]), set()
    for query_id, block in zip(queries["query_id"], queries["query_block"], strict=True):
        if not any(part.first_query <= query_id <= part.last_query for part in whole):
            open_blocks.add(block)
    return held - open_blocks
