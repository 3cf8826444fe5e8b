"""Which score shards of which runs are pending, running, done, failed or quarantined.

Who writes what, so that no lock is ever held and no reader is ever locked out:

- a worker writes the Parquet file and the manifest of the shards that it finished, and one file of attempt records
  that is its own (`runs/<run>/attempts/<worker>.jsonl`);
- the coordinator of a run writes the plan, once, and replaces `runs/<run>/shards.parquet`, this ledger, by rename;
- who publishes replaces `current.json` and `catalog.duckdb` by rename.

DuckDB lets one process at a time open a file that it may write, and no other process, even one that only reads, may
open it meanwhile (measured on 2.0.0). So nobody opens a published DuckDB file for writing: SQL reads Parquet through
views in memory.

The ledger holds nothing of its own: `read_ledger` derives it from plan, manifests and attempt records, and
`rebuild_ledgers` (`fastgda ledger rebuild`) writes it anew. Without the attempt records a shard that failed is
pending again, and nothing else is lost.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas import tables
from storage_schemas.commit import Manifest, code_version, read_manifest, worker_name
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, matching, replace, write_atomically
from storage_schemas.workspace import Workspace


class ShardState(StrEnum):
    pending = "pending"
    running = "running"
    done = "done"
    failed = "failed"
    quarantined = "quarantined"


class UnknownRun(StoreError):
    """The workspace holds no such run."""


class RunRecord(BaseModel):
    """`runs/<run>/run.json`: what a run is; paths are relative to the workspace, None where it has no such file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    name: str = Field(description="the configuration's name")
    teacher: str
    created_at: datetime
    code_version: str = Field(default_factory=code_version)
    shards: int = Field(ge=0, description="score shards planned")
    pairs: int = Field(ge=0, description="score rows planned")
    samples: str | None = None
    rejected_samples: str | None = None
    queries: str | None = None
    candidates: str | None = None
    base_losses: str | None = Field(default=None, description="folder")
    config: dict[str, object] = Field(description="the pipeline's configuration")


class Part(BaseModel):
    """One large, sorted, immutable file of rank labels that holds all rows of some queries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    path: str = Field(description="relative to the workspace")
    rows: int = Field(ge=0)
    queries: int = Field(ge=0)
    first_query: str = Field(description="least query_id in it")
    last_query: str = Field(description="greatest query_id in it")
    sha256: str


class Compaction(BaseModel):
    """`runs/<run>/compaction.json`: the parts that together hold all rows of a finished run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: list[Part]


class Attempt(BaseModel):
    """One line of a worker's attempt file: a shard was started, or how that ended."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    shard: int
    state: ShardState
    at: datetime
    worker: str
    device: str = ""
    seconds: float = 0.0
    error_class: str = ""
    error: str = ""


LEDGER_SECONDS = 5.0  # between two refreshes of a running run's ledger, at least
MAX_ERROR = 2_000  # characters of a message that an attempt record keeps


@dataclass
class AttemptLog:
    """The attempt records of one worker on one run: a file that nobody else writes.

    A record is one line, appended whole. An object store cannot append, so there the file is put anew with each
    record.
    """

    workspace: Workspace
    run: str
    worker: str = field(default_factory=worker_name)
    _lines: list[bytes] = field(default_factory=list, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        name = "".join(letter if letter.isalnum() else "-" for letter in self.worker)
        self._path = self.workspace.attempts(self.run) / f"{name}-{uuid.uuid4().hex[:8]}.jsonl"

    @contextmanager
    def attempt(self, shard: int, device: str) -> Iterator[None]:
        """Record that `shard` is being worked on, and, when the block fails, by what; success is the manifest's."""
        started = time.monotonic()
        self.record(shard, ShardState.running, device=device)
        try:
            yield
        except BaseException as error:
            seconds = time.monotonic() - started
            self.record(shard, ShardState.failed, device=device, seconds=seconds, error=error)
            raise

    def record(
        self,
        shard: int,
        state: ShardState,
        *,
        device: str = "",
        seconds: float = 0.0,
        error: BaseException | None = None,
    ) -> None:
        attempt = Attempt(
            shard=shard,
            state=state,
            at=datetime.now(UTC),
            worker=self.worker,
            device=device,
            seconds=seconds,
            error_class=type(error).__name__ if error else "",
            # A file name in a message may have bytes that are no text.
            error=str(error)[:MAX_ERROR].encode(errors="backslashreplace").decode() if error else "",
        )
        line = json.dumps(attempt.model_dump(mode="json")).encode() + b"\n"
        with self._lock:
            if isinstance(self._path, Path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                try:
                    os.write(handle, line)
                finally:
                    os.close(handle)
            else:
                self._lines.append(line)
                replace(self._path, b"".join(self._lines))


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
    """Raises UnknownRun, naming those that there are."""
    try:
        return RunRecord.model_validate_json(workspace.run(run).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        known = ", ".join(run_names(workspace)[-5:]) or "none"
        raise UnknownRun(f"{workspace.root} has no run {run}; it has: {known}") from None


def run_names(workspace: Workspace) -> list[str]:
    """All planned runs, oldest plan first by name."""
    if not workspace.runs.exists():
        return []
    return sorted(folder.name for folder in workspace.runs.iterdir() if (folder / "run.json").exists())


def read_compaction(workspace: Workspace, run: str) -> Compaction | None:
    """The run's large files, if it was compacted."""
    try:
        return Compaction.model_validate_json(workspace.compaction(run).read_bytes())
    except FileNotFoundError:
        return None


def read_ledger(workspace: Workspace, run: str) -> pa.Table:
    """The state of every planned shard, as rows of `tables.SHARDS`, from plan, manifests and attempts.

    Raises:
        UnknownRun: there is no such run.
    """
    read_run(workspace, run)
    plan = tables.read(workspace.plan_shards(run), tables.PLAN_SHARDS).to_pylist()
    attempts = _attempts(workspace, run)
    sizes = _sizes(workspace.scores(run))
    held = _held_by_parts(workspace, run)
    rows = [_ledger_row(workspace, run, planned, attempts.get(planned["shard"], []), sizes, held) for planned in plan]
    return pa.Table.from_pylist(rows, schema=tables.SHARDS.schema)


def write_ledger(workspace: Workspace, run: str) -> pa.Table:
    """Derive the ledger of a run and put it where SQL looks."""
    ledger = read_ledger(workspace, run)
    write_atomically(workspace.ledger(run), tables.SHARDS.encode(ledger, {}))
    return ledger


@contextmanager
def kept_ledger(workspace: Workspace, run: str) -> Iterator[Callable[[], None]]:
    """For a run's coordinator: the ledger is written at the start, at the end however that comes, and in between
    when the yielded function is called and the last time is long enough ago to cost a twentieth at most.
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
    """Write the ledger of every run anew; shards by run."""
    return {run: write_ledger(workspace, run).num_rows for run in run_names(workspace)}


def done_shards(workspace: Workspace, run: str) -> set[int]:
    """Numbers of the shards whose rows are committed."""
    ledger = read_ledger(workspace, run).to_pydict()
    return {n for n, state in zip(ledger["shard"], ledger["state"], strict=True) if state == ShardState.done}


def _ledger_row(
    workspace: Workspace,
    run: str,
    planned: dict[str, Any],
    attempts: list[Attempt],
    sizes: dict[str, int],
    held: set[int],
) -> dict[str, object]:
    shard = planned["shard"]
    path = workspace.score_shard(run, shard)
    manifest = _manifest_of(path, sizes, planned["input_key"])
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
    if manifest is not None and (path.name in sizes or planned["query_block"] in held):
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
        return row | {"state": ShardState.running if _alive(last.worker) else ShardState.pending}
    return row | {"state": last.state, "error_class": last.error_class, "error": last.error}


def _manifest_of(path: AnyPath, sizes: dict[str, int], key: str) -> Manifest | None:
    """The shard's manifest, unless it is of other work or of another file than the one that is there."""
    if f"{path.name}.manifest.json" not in sizes:
        return None
    manifest = read_manifest(path)
    if manifest is None or manifest.input_key != key or sizes.get(path.name, manifest.size) != manifest.size:
        return None
    return manifest


def _sizes(folder: AnyPath) -> dict[str, int]:
    """Name and size of every file of a folder, in one listing."""
    if isinstance(folder, Path):
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries}
        except FileNotFoundError:
            return {}
    try:
        listed = folder.fs.ls(folder.path, detail=True, refresh=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listed}


def _held_by_parts(workspace: Workspace, run: str) -> set[int]:
    """Blocks of queries all of whose rows are in the run's large files, so that their shards' files may be gone."""
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


def _attempts(workspace: Workspace, run: str) -> dict[int, list[Attempt]]:
    """The attempt records of each shard, oldest first. A line that a crash cut short is passed over."""
    found: dict[int, list[Attempt]] = {}
    for path in matching(workspace.attempts(run), "*.jsonl"):
        for line in path.read_bytes().splitlines():
            try:
                attempt = Attempt.model_validate_json(line)
            except ValidationError:
                continue
            found.setdefault(attempt.shard, []).append(attempt)
    for several in found.values():
        several.sort(key=lambda attempt: attempt.at)
    return found


def _alive(worker: str) -> bool:
    """Whether the process behind host:pid may still run; one on another host is given the benefit of the doubt."""
    host, _, pid = worker.rpartition(":")
    if host != os.uname().nodename or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
