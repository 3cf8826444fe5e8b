"""The small tables of SQL, which are loaded: ledger, quarantine, runs, heads, indexes, take-downs, sketches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from storage_schemas import tables
from storage_schemas.commit import read_manifest
from storage_schemas.files import matching
from storage_schemas.heads.records import HEAD_FILE, INDEX_LISTS, indexed_table, read_head_record, read_index_record
from storage_schemas.runs.sketches import sketch_rows
from storage_schemas.sql.state import State
from storage_schemas.table import Table
from storage_schemas.tombstones import Tombstone, Tombstones, without
from storage_schemas.workspace import Workspace


def loaded_tables(workspace: Workspace, state: State) -> dict[Table, pa.Table]:
    """Return the rows of each small table."""
    ledgers = [workspace.ledger(run) for run in state.runs if workspace.ledger(run).exists()]
    shards = [tables.read(path, tables.SHARDS) for path in ledgers]
    quarantined = [
        without(tables.read(path, tables.QUARANTINED_SAMPLES), state.masks.of(record.samples).train_ids)
        for run, record in state.runs.items()
        if (path := workspace.quarantined_samples(run)).exists()
    ]
    return {
        tables.SHARDS: pa.concat_tables([tables.SHARDS.schema.empty_table(), *shards]),
        tables.QUARANTINED_SAMPLES: pa.concat_tables([tables.QUARANTINED_SAMPLES.schema.empty_table(), *quarantined]),
        tables.RUNS: _run_rows(state, shards),
        tables.HEADS: _head_rows(workspace, state),
        tables.INDEXES: _index_rows(workspace, state),
        tables.TOMBSTONES: _tombstone_rows(state.masks.tombstones),
        tables.SKETCHES: pa.Table.from_pylist(list(sketch_rows(workspace, state.runs)), schema=tables.SKETCHES.schema),
    }


def _run_rows(state: State, ledgers: list[pa.Table]) -> pa.Table:
    by_run = {ledger["run"][0].as_py(): ledger.to_pydict() for ledger in ledgers if ledger.num_rows}
    live = set(state.snapshot.runs) if state.snapshot else set()
    rows = []
    for run, record in state.runs.items():
        ledger = by_run.get(run)
        states = ledger["state"] if ledger else []
        done = states.count("done")
        failed = states.count("failed") + states.count("quarantined")
        if run in live:
            word = "published"
        elif done == record.shards:
            word = "done"
        elif "running" in states or not any(states.count(word) for word in ("done", "failed", "quarantined")):
            word = "running" if "running" in states else "planned"
        else:
            word = "incomplete"
        rows.append(
            {
                "run": run,
                "name": record.name,
                "teacher": record.teacher,
                "state": word,
                "created_at": record.created_at,
                "code_version": record.code_version,
                "shards": record.shards,
                "done": done,
                "failed": failed,
                "pairs": record.pairs,
                "rows": sum(ledger["rows"]) if ledger else 0,
                "seconds": sum(ledger["seconds"]) if ledger else 0.0,
                "config": json.dumps(record.config, ensure_ascii=False),
                "stale": state.masks.stale(record.samples),
            }
        )
    return pa.Table.from_pylist(rows, schema=tables.RUNS.schema)


def _head_rows(workspace: Workspace, state: State) -> pa.Table:
    rows = []
    for path in matching(workspace.root / "heads", f"*/{HEAD_FILE}"):
        head = read_head_record(path.parent)
        learned = state.runs.get(head.run or "")
        rows.append(
            {
                "head": path.parent.name,
                "run": head.run or "",
                "snapshot": head.snapshot or "",
                "feature_space": head.feature_space,
                "best_epoch": head.best_epoch,
                "validation_map": head.validation_map,
                "served": bool(state.published and state.published.head == workspace.relative(path.parent)),
                "stale": learned is not None and state.masks.stale(learned.samples),
            }
        )
    return pa.Table.from_pylist(rows, schema=tables.HEADS.schema)


def _index_rows(workspace: Workspace, state: State) -> pa.Table:
    rows = []
    for path in matching(workspace.root / "indexes", "*/index.faiss"):
        manifest = read_manifest(path)
        if manifest is None:  # it is being built
            continue
        served = bool(state.published and state.published.index == workspace.relative(path.parent))
        about = read_index_record(path.parent)
        samples = indexed_table(workspace, path.parent, about) if state.masks.tombstones.active else None
        lists = read_manifest(path.with_name(INDEX_LISTS)) if about.on_disk else None
        # Indexes of earlier releases do not name their head: of the served one it is known.
        head = about.head or (state.published.head_version if served and state.published else "")
        rows.append(
            {
                "index_version": path.parent.name,
                "head": head,
                "vectors": manifest.rows,
                "size": manifest.size + (lists.size if lists is not None else 0),
                "served": served,
                "stale": state.masks.stale_index(path.parent, samples),
                "kind": about.kind,
                "recall_at_10": about.recall_at_10,
                "recall_at_100": about.recall_at_100,
                "parent": about.parent,
            }
        )
    return pa.Table.from_pylist(rows, schema=tables.INDEXES.schema)


def _tombstone_rows(tombstones: Tombstones) -> pa.Table:
    lifted = {record.lifts: record for record in tombstones.records if record.lifts is not None}
    rows = [row for record in tombstones.records for row in _removed_rows(record, lifted.get(record.number))]
    return pa.Table.from_pylist(rows, schema=tables.TOMBSTONES.schema)


def _removed_rows(record: Tombstone, lifting: Tombstone | None) -> Iterator[dict[str, Any]]:
    held = record.model_dump(include={"number", "reason", "indexes", "heads", "runs", "snapshots", "reports"})
    said = {"in_force": lifting is None, "removed_at": record.at, "removed_by": record.by}
    if lifting is not None:
        said |= {"lifted_by": lifting.by, "lifted_at": lifting.at, "lifted_reason": lifting.reason}
    for sample in record.removed:
        yield sample.model_dump() | held | said
