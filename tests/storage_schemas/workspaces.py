"""Small published workspaces, written with the real commit protocol."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas import tables
from storage_schemas.commit import commit, commit_table, input_key
from storage_schemas.files import write_atomically
from storage_schemas.heads.evaluations import EvaluationRecord, write_evaluation
from storage_schemas.heads.records import HEAD_FILE, INDEX_FILE, INDEX_IDS, HeadRecord, IndexRecord, as_json
from storage_schemas.publishing.publish import publish_runs, update_published
from storage_schemas.runs.ledger import write_plan
from storage_schemas.runs.records import RunRecord
from storage_schemas.snapshots.published import Published
from storage_schemas.table import Added, Table
from storage_schemas.workspace import Workspace, part

KEY = "0123456789abcdef"
QUERIES = ("q0", "q1", "q2")


def write_table(path: Path, table: Table, rows: list[dict[str, object]], key: str = KEY) -> Path:
    defaults = {name: added.default for name, added in table.added.items()}
    rows_ = pa.Table.from_pylist([{**defaults, **row} for row in rows], schema=table.schema)
    commit_table(path, rows_, table, key=key, started=time.monotonic(), device="x")
    return path


def plan_run(
    root: Path,
    run: str = "run-1",
    *,
    queries: Sequence[str] = QUERIES,
    captions: Sequence[str] = ("a cat", "a dog"),
    samples: int = 4,
    config: dict[str, object] | None = None,
) -> RunRecord:
    """Every query against every sample, one score shard a query, with the tables that SQL shows beside them."""
    workspace = Workspace(root)
    sample_rows: list[dict[str, object]] = [
        {
            "train_id": train,
            "key": f"s{train}",
            "shard": "a.tar",
            "offset": 512,
            "size": 9,
            "captions": list(captions),
            "width": 8,
            "height": 8,
            "image_sha256": f"{train:064x}",
        }
        for train in range(samples)
    ]
    query_rows: list[dict[str, object]] = [
        {"query_id": query, "split": "test", "caption": captions[0], "image": b"png", "image_sha256": "0" * 64}
        for query in queries
    ]
    candidate_rows: list[dict[str, object]] = [
        {"query_id": query, "train_id": train, "neighbor_rank": train + 1, "similarity": 0.5}
        for query in queries
        for train in range(samples)
    ]
    key = input_key(samples, list(captions))
    record = RunRecord(
        run=run,
        name="shapes",
        teacher="abu_plus",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        shards=len(queries),
        pairs=len(queries) * samples,
        samples=workspace.relative(write_table(workspace.samples(key), tables.SAMPLES, sample_rows)),
        rejected_samples=workspace.relative(write_table(workspace.rejected_samples(key), tables.REJECTED_SAMPLES, [])),
        queries=workspace.relative(write_table(workspace.queries(run), tables.QUERIES, query_rows)),
        candidates=workspace.relative(write_table(workspace.candidates(run), tables.CANDIDATES, candidate_rows)),
        config=config or {},
    )
    numbers = range(len(queries))
    shards = tables.PLAN_SHARDS.rows(
        shard=numbers,
        input_key=[shard_key(run, number) for number in numbers],
        query_block=numbers,
        pairs=[samples] * len(queries),
    )
    planned = tables.PLAN_QUERIES.rows(query_id=list(queries), query_block=numbers, pairs=[samples] * len(queries))
    write_plan(workspace, record, shards, planned)
    return record


def shard_key(run: str, shard: int) -> str:
    return input_key(run, shard)


def commit_shard(root: Path, run: str, shard: int, query_id: str, samples: int = 4, shift: float = 0.0) -> None:
    """The scores 0, 1, 2, 0, ... of one query, all moved by `shift`."""
    rows: list[dict[str, object]] = [
        {"query_id": query_id, "train_id": train, "score": float(train % 3) + shift} for train in range(samples)
    ]
    write_table(Workspace(root).score_shard(run, shard), tables.SCORES, rows, shard_key(run, shard))


def finish_run(
    root: Path,
    run: str = "run-1",
    *,
    queries: Sequence[str] = QUERIES,
    captions: Sequence[str] = ("a cat", "a dog"),
    samples: int = 4,
    shift: float = 0.0,
) -> RunRecord:
    """A planned run all of whose shards are committed."""
    record = plan_run(root, run, queries=queries, captions=captions, samples=samples)
    for number, query_id in enumerate(queries):
        commit_shard(root, run, number, query_id, samples, shift)
    return record


def publish_run(
    root: Path,
    run: str = "run-1",
    *,
    queries: Sequence[str] = QUERIES,
    captions: Sequence[str] = ("a cat", "a dog"),
    samples: int = 4,
    extras: bool = False,
) -> Published:
    """A finished run as readers see it; `extras` adds metrics, base losses and checked pairs."""
    workspace = Workspace(root)
    finish_run(root, run, queries=queries, captions=captions, samples=samples)
    published = publish_runs(workspace, [run])
    if not extras:
        return published
    exact, losses = workspace.exact_check(run), workspace.parts("base losses", KEY)
    write_table(
        part(exact, 0),
        tables.SCORES,
        [{"query_id": queries[0], "train_id": train, "score": float(train)} for train in range(2)],
    )
    write_table(part(losses, 0), tables.BASE_LOSSES, [{"train_id": 0, "flip": 0, "base_loss": 0.5}])
    metric: dict[str, object] = {
        "metric": "mAP",
        "space": "tuned",
        "split": "test",
        "cutoff": 2,
        "query_id": "",
        "value": 0.5,
        "standard_error": 0.1,
        "queries": 3,
    }
    metrics = write_table(workspace.metrics("m"), tables.METRICS, [metric])
    paths = {
        name: workspace.relative(path)
        for name, path in (("exact_check", exact), ("base_losses", losses), ("metrics", metrics))
    }
    return show(workspace, **paths)


def show(workspace: Workspace, **fields: Any) -> Published:
    """Make these files of the workspace some of what readers see."""
    published = update_published(workspace, lambda before: before and before.model_copy(update=fields))
    assert published is not None
    return published


def commit_index(
    workspace: Workspace,
    version: str,
    samples: str,
    *,
    head: str = "head",
    run: str = "run-1",
    precision: dict[str, float] | None = None,
    snapshot: str = "",
    train_ids: Sequence[int] = range(4),
    **record: Any,
) -> str:
    """An index and its head as far as the store knows them; `precision`: the AP of each test query on a snapshot."""
    folder, place = workspace.index(version), workspace.head(head)
    described = HeadRecord(feature_space="pixel", run=run, snapshot=snapshot)
    write_atomically(place / HEAD_FILE, as_json(described))
    write_atomically(folder / INDEX_FILE, as_json(IndexRecord(head=head, samples=samples, **record)))
    write_table(folder / INDEX_IDS, tables.INDEX_IDS, [{"train_id": train_id} for train_id in train_ids], version)
    content = version.encode()
    commit(
        folder / "index.faiss", lambda path: path.write_bytes(content), key=version, rows=len(train_ids), started=0.0
    )
    if precision is not None:
        mean = sum(precision.values()) / len(precision)
        figure = {"space": "tuned", "split": "test", "cutoff": 100, "standard_error": 0.0, "queries": 1}
        rows = [figure | {"metric": "mAP", "query_id": "", "value": mean}]
        rows += [figure | {"metric": "AP", "query_id": name, "value": value} for name, value in precision.items()]
        write_table(workspace.metrics(head), tables.METRICS, rows)
        write_evaluation(workspace, head, EvaluationRecord(head=head, snapshot=snapshot))
    return version


def with_column(
    table: Table, name: str, kind: pa.DataType, default: bool | int | float | str | None, *, position: int = 0
) -> Table:
    """The table as a later release has it: of the next version, which brought one more column."""
    new = pa.field(name, kind, nullable=default is None, metadata={"comment": "new"})
    version = table.version + 1
    schema = table.schema.insert(position, new)
    added = {**table.added, name: Added(version, default)}
    return dataclasses.replace(table, schema=schema, version=version, added=added)


def first_version(table: Table) -> Table:
    """The table before any column was added to it."""
    schema = pa.schema([field for field in table.schema if field.name not in table.added])
    return dataclasses.replace(table, schema=schema, version=table.oldest, added={})


def spoil_column(path: Path, name: str) -> None:
    """Flip a bit in the first rows of a column of a Parquet file."""
    column = pq.read_schema(path).get_field_index(name)
    chunk = pq.read_metadata(path).row_group(0).column(column)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
