"""SQL over a workspace: views on the Parquet files where they lie.

`connect` gives a private in-memory database whose views read committed files: it locks nothing and nothing
locks it out. `catalog.duckdb` holds the same views for tools that want a file; it is built under another
name and renamed, so nobody ever opens the published one for writing.

`scores` and `ranks` are the published snapshot: a fixed list of files. `run_scores` shows every run as it grows, and
before anything is published `samples` are those that were indexed last; what was rejected of these is always shown.
"""

from __future__ import annotations

import json
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from storage_schemas import tables
from storage_schemas.commit import read_manifest
from storage_schemas.database import (
    allowed_folders,
    damage_explained,
    duckdb_type,
    file_list,
    half_the_memory,
    literal,
    new_connection,
    parts_glob,
    rows_of,
)
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, is_there, matching, temporary_name
from storage_schemas.heads.records import (
    HEAD_FILE,
    check_tables,
    indexed_tables,
    read_head_record,
    read_index_record,
)
from storage_schemas.indexed_samples import Indexed, read_indexed
from storage_schemas.runs.ledger import read_compaction, read_run, run_names
from storage_schemas.runs.records import Part
from storage_schemas.runs.sketches import sketch_rows
from storage_schemas.snapshots.changes import DEFAULT_K, changes_sql
from storage_schemas.snapshots.published import NotPublished, OtherRelease, Published, read_published
from storage_schemas.snapshots.snapshots import Snapshot, read_snapshot
from storage_schemas.sql.answers import Answer
from storage_schemas.sql.masks import Masks, tombstone_rows
from storage_schemas.sql.shares import shares_macro, shares_view
from storage_schemas.table import Table
from storage_schemas.tombstones import without
from storage_schemas.workspace import Workspace, regenerated, retrained, twins_beside


class RefusedStatement(StoreError):
    """SQL that is not a single read-only query."""


def connect(
    location: str | AnyPath, *, memory_gigabytes: float | None = None, threads: int | None = None
) -> duckdb.DuckDBPyConnection:
    """Open a workspace for reading, in memory: the published snapshot and every run, as they are at this moment.

    The connection reads files inside the workspace only, and its settings are locked. It goes on to see the snapshot
    that it was opened on; open another to see a newer one.

    Args:
        location: folder or URL of the workspace.
        memory_gigabytes: half of the machine's unless given; what does not fit is spilled to a temporary folder.
        threads: all cores unless given.

    Raises:
        NotPublished: there is neither a run nor an index of samples, or what is published is another release's.
        DamagedTable: a file cannot be read.
    """
    workspace = Workspace.at(location)
    state = _State.of(workspace)
    spill = tempfile.TemporaryDirectory(prefix="fastgda-sql-")
    connection = new_connection(
        workspace, memory_gigabytes=memory_gigabytes or half_the_memory(), threads=threads, spill=spill.name
    )
    weakref.finalize(connection, spill.cleanup)
    # Footers of immutable files are worth keeping.
    connection.execute("SET parquet_metadata_cache = true")
    connection.execute("SET timezone = 'UTC'")
    connection.execute(f"SET allowed_directories = {allowed_folders(workspace.root)}")
    connection.execute("SET enable_external_access = false")
    with damage_explained(workspace):
        _create_views(connection, workspace, state)
    connection.execute("SET lock_configuration = true")
    return connection


def query(
    location: str | AnyPath, statement: str, *, memory_gigabytes: float | None = None, threads: int | None = None
) -> pa.Table:
    """Run one read-only statement over a workspace.

    Raises:
        NotPublished, DamagedTable: see `connect`.
        RefusedStatement: several statements, or one that is no query.
        duckdb.Error: the query is wrong, or does not fit the memory that it may take.
    """
    with ask(location, statement, memory_gigabytes=memory_gigabytes, threads=threads) as answer:
        return answer.table()


@contextmanager
def ask(
    location: str | AnyPath, statement: str, *, memory_gigabytes: float | None = None, threads: int | None = None
) -> Iterator[Answer]:
    """Run one statement as `query` does, for rows that need not fit into memory: they are read inside the block."""
    connection = connect(location, memory_gigabytes=memory_gigabytes, threads=threads)
    try:
        with damage_explained(Workspace.at(location)):
            checked = single_query(connection, statement)
            yield Answer(connection, checked, connection.sql(checked))
    finally:
        connection.close()


def single_query(connection: duckdb.DuckDBPyConnection, statement: str) -> duckdb.Statement:
    """Return the one query that a person's text must be.

    Raises:
        RefusedStatement: it is several statements, or no query.
    """
    statements = connection.extract_statements(statement)
    if len(statements) != 1:
        raise RefusedStatement(f"{len(statements)} statements given: run one query at a time")
    found = statements[0]
    if found.type == duckdb.StatementType.EXPLAIN:
        # EXPLAIN ANALYZE runs what it explains, so that must be a query too.
        explained = re.sub(r"^\s*EXPLAIN\s+(ANALYZE\s+|\([^()]*\)\s*(?=\w))?", "", found.query, flags=re.IGNORECASE)
        kinds = [each.type for each in connection.extract_statements(explained)]
        if kinds != [duckdb.StatementType.SELECT]:
            raise RefusedStatement("only a query can be explained: the workspace is open for reading only")
    elif found.type != duckdb.StatementType.SELECT:
        raise RefusedStatement(f"{found.type.name} is refused: the workspace is open for reading only")
    return found


def write_catalog(workspace: Workspace) -> None:
    """Build `catalog.duckdb` anew and put it in place by rename; on an object store there is none."""
    if not isinstance(workspace.root, Path) or not isinstance(workspace.catalog, Path):
        return
    temporary = workspace.catalog.with_name(temporary_name(workspace.catalog.name))
    temporary.unlink(missing_ok=True)
    try:
        with damage_explained(workspace), new_connection(workspace, database=str(temporary)) as connection:
            connection.begin()  # else each of some 200 statements waits for the disk
            _create_views(connection, workspace, _State.of(workspace))
            connection.commit()
        temporary.replace(workspace.catalog)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _State:
    """The content of the workspace at one moment; published and snapshot are None before the first run is published."""

    published: Published | None
    snapshot: Snapshot | None
    indexed: Indexed | None
    runs: list[str]
    masks: Masks

    @classmethod
    def of(cls, workspace: Workspace) -> _State:
        runs, indexed, masks = run_names(workspace), read_indexed(workspace), Masks(workspace)
        try:
            published = read_published(workspace)
        except NotPublished as error:
            # A first run can be watched while it grows, from its samples on.
            if not (runs or indexed) or isinstance(error, OtherRelease):
                raise
            return cls(None, None, indexed, runs, masks)
        return cls(published, read_snapshot(workspace, published.snapshot), indexed, runs, masks)

    @property
    def samples(self) -> str | None:
        """The published samples with those that were added to the served index, or else those indexed last."""
        if self.published is not None:
            return self.published.index_samples or self.published.samples
        return self.indexed.samples if self.indexed else None

    @property
    def rejected_samples(self) -> list[str]:
        """Tables of what was rejected beside the published samples, and beside those that were indexed last."""
        both = (self.published and self.published.rejected_samples, self.indexed and self.indexed.rejected_samples)
        return list(dict.fromkeys(path for path in both if path))


def _create_views(connection: duckdb.DuckDBPyConnection, workspace: Workspace, state: _State) -> None:
    published, snapshot = state.published, state.snapshot

    def files(*relative: str | None) -> str | None:
        chosen = [workspace.file(path) for path in relative if path is not None]
        return file_list(chosen) if chosen else None

    def folder(relative: str | None) -> str | None:
        return None if relative is None else _parts(workspace.file(relative))

    ranks = files(*(part.path for part in snapshot.parts)) if snapshot else None
    twins = files(*_twins(workspace, published.queries)) if published else None
    left_out = state.masks.of(state.samples)
    sources = {
        tables.SAMPLES: files(state.samples),
        tables.REJECTED_SAMPLES: files(*state.rejected_samples),
        tables.QUERIES: files(*published.queries) if published else None,
        tables.TWINS: twins,
        tables.CANDIDATES: files(*published.candidates) if published else None,
        tables.BASE_LOSSES: folder(published.base_losses) if published else None,
        tables.SCORES: ranks,
        tables.STUDY: files(published.compared_heads) if published else None,
        **_retrainings(workspace, published.run if published else None),
    }
    for table, source in sources.items():
        # Two tables of what was rejected may have a tar in common.
        rows = "DISTINCT " if table is tables.REJECTED_SAMPLES and len(state.rejected_samples) > 1 else ""
        shown = left_out.queries(twins) if table is tables.QUERIES else left_out.rows(table)
        _create_view(connection, table, [_select(table, source, rows) + shown] if source else [])
    ranked = _ranks(workspace, snapshot.parts, left_out.rows(tables.RANKS)) if snapshot else []
    _create_view(connection, tables.RANKS_VIEW, ranked)
    _create_view(connection, tables.METRICS, _metrics(workspace, published) if published else [])
    connection.execute(shares_macro())
    _create_view(connection, tables.SHARES_VIEW, [shares_view()])
    exact = folder(published.exact_check) if published else None
    checked = [_select(tables.SCORES, exact) + left_out.rows(tables.SCORES)] if exact else []
    _create_view(connection, tables.EXACT_CHECK, checked)
    _create_view(connection, tables.RUN_SCORES, _run_scores(workspace, state))
    _create_view(connection, tables.ANSWERS_CHANGED, _changes(workspace, state))
    _load(connection, workspace, state)


def _changes(workspace: Workspace, state: _State) -> Iterator[str]:
    """Yield SQL for what the newest snapshot changed."""
    published = state.published
    before = published.snapshot_before if published else None
    if published is not None and before is not None and is_there(workspace.snapshot(before)):
        tombstones = state.masks.tombstones
        yield f"({changes_sql(workspace, before, published.snapshot, DEFAULT_K, tombstones)})"


def _twins(workspace: Workspace, queries: Iterable[str]) -> Iterator[str]:
    """Yield the twins of query sets that have a twin test; query sets of earlier releases have none."""
    for relative in queries:
        path = twins_beside(workspace.file(relative))
        if path.exists():
            yield workspace.relative(path)


def _retrainings(workspace: Workspace, run: str | None) -> dict[Table, str | None]:
    """Return SQL for the models by which a run was judged, their losses, their pictures, and how far these are."""
    several = (tables.RETRAININGS, tables.RETRAINED_LOSSES, tables.REGENERATIONS, tables.REGENERATION_DISTANCES)
    found: dict[Table, str | None] = dict.fromkeys(several)
    if run is None or not (path := workspace.retraining_list(run)).exists():
        return found
    rows = tables.read(path, tables.RETRAININGS)
    models = dict.fromkeys(zip(rows["recipe"].to_pylist(), rows["retraining"].to_pylist(), strict=True))
    places = [(workspace.retrainings(recipe), name) for recipe, name in models]
    found[tables.RETRAININGS] = file_list([path])
    found[tables.RETRAINED_LOSSES] = file_list(retrained(*place) for place in places)
    if pictures := [there for place in places if (there := regenerated(*place)).exists()]:
        found[tables.REGENERATIONS] = file_list(pictures)
    if (distances := workspace.regeneration_distances(run)).exists():
        found[tables.REGENERATION_DISTANCES] = file_list([distances])
    return found


def _metrics(workspace: Workspace, published: Published) -> Iterator[str]:
    """Yield SQL for the figures of the published head, and for what its run's teacher was found to be since then."""
    checks = check_tables(workspace, published.run)
    found = _select(tables.METRICS, file_list(checks)) if checks else ""
    measured = [workspace.file(path) for path in (published.metrics, published.study) if path is not None]
    if found:
        yield found
    if measured:
        # An evaluation copies what the checks had found; those may have been made again after it.
        again = f" ANTI JOIN ({found}) USING (metric, space, split, cutoff)" if found else ""
        yield _select(tables.METRICS, file_list(measured)) + again


def _ranks(workspace: Workspace, parts: Iterable[Part], shown: str) -> Iterator[str]:
    """Yield SQL for the rows of each labelling, with their influence; `shown` leaves rows out."""
    by_labelling: dict[str, list[AnyPath]] = {}
    for part in parts:
        by_labelling.setdefault(part.negatives, []).append(workspace.file(part.path))
    for negatives, paths in by_labelling.items():
        influence = "score" if negatives == "keep" else "greatest(score, 0)"
        source = rows_of(tables.RANKS, file_list(paths))
        yield f"SELECT {_columns(tables.RANKS)}, {influence} AS influence FROM {source}{shown}"


def _parts(folder: AnyPath) -> str | None:
    """Return SQL for all parts of a folder, those that are yet to come included; None while there is none."""
    return parts_glob(folder) if matching(folder, "part-*.parquet") else None


def _run_scores(workspace: Workspace, state: _State) -> Iterator[str]:
    for run in state.runs:
        compaction = read_compaction(workspace, run)
        if compaction is not None:
            source: str | None = file_list(workspace.file(part.path) for part in compaction.parts)
        else:
            source = _parts(workspace.scores(run))
        if source is not None:
            rows = rows_of(tables.SCORES, source)
            shown = state.masks.of_run(run).rows(tables.SCORES)
            yield f"SELECT {literal(run)} AS run, {_columns(tables.SCORES)} FROM {rows}{shown}"


def _select(table: Table, files: str, rows: str = "") -> str:
    return f"SELECT {rows}{_columns(table)} FROM {rows_of(table, files)}"


def _create_view(connection: duckdb.DuckDBPyConnection, table: Table, selects: Iterable[str]) -> None:
    source = " UNION ALL ".join(selects) or f"SELECT {_no_values(table)} WHERE false"
    connection.execute(f"CREATE VIEW {table.name} AS {source}")
    _comment(connection, "VIEW", table)


def _load(connection: duckdb.DuckDBPyConnection, workspace: Workspace, state: _State) -> None:
    """Load the small tables: ledger, quarantined samples, runs, heads, indexes, take-downs, sketches."""
    ledgers = [workspace.ledger(run) for run in state.runs if workspace.ledger(run).exists()]
    shards = [tables.read(path, tables.SHARDS) for path in ledgers]
    left_out = {run: workspace.quarantined_samples(run) for run in state.runs}
    quarantined = [
        without(tables.read(path, tables.QUARANTINED_SAMPLES), state.masks.of_run(run).train_ids)
        for run, path in left_out.items()
        if path.exists()
    ]
    loaded = {
        tables.SHARDS: pa.concat_tables([tables.SHARDS.schema.empty_table(), *shards]),
        tables.QUARANTINED_SAMPLES: pa.concat_tables([tables.QUARANTINED_SAMPLES.schema.empty_table(), *quarantined]),
        tables.RUNS: _run_rows(workspace, state, shards),
        tables.HEADS: _head_rows(workspace, state),
        tables.INDEXES: _index_rows(workspace, state),
        tables.TOMBSTONES: tombstone_rows(state.masks.tombstones),
        tables.SKETCHES: pa.Table.from_pylist(list(sketch_rows(workspace, state.runs)), schema=tables.SKETCHES.schema),
    }
    for table, rows in loaded.items():
        connection.register("given", rows.cast(table.schema))
        connection.execute(f"CREATE TABLE {table.name} AS SELECT {_columns(table)} FROM given")
        connection.unregister("given")
        _comment(connection, "TABLE", table)


def _run_rows(workspace: Workspace, state: _State, ledgers: list[pa.Table]) -> pa.Table:
    by_run = {ledger["run"][0].as_py(): ledger.to_pydict() for ledger in ledgers if ledger.num_rows}
    live = set(state.snapshot.runs) if state.snapshot else set()
    rows = []
    for run in state.runs:
        record, ledger = read_run(workspace, run), by_run.get(run)
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


def _head_rows(workspace: Workspace, state: _State) -> pa.Table:
    rows = []
    samples = {run: read_run(workspace, run).samples for run in state.runs} if state.masks.tombstones.active else {}
    for path in matching(workspace.root / "heads", f"*/{HEAD_FILE}"):
        head = read_head_record(path.parent)
        rows.append(
            {
                "head": path.parent.name,
                "run": head.run or "",
                "snapshot": head.snapshot or "",
                "feature_space": head.feature_space,
                "best_epoch": head.best_epoch,
                "validation_map": head.validation_map,
                "served": bool(state.published and state.published.head == workspace.relative(path.parent)),
                "stale": state.masks.stale(samples.get(head.run or "")),
            }
        )
    return pa.Table.from_pylist(rows, schema=tables.HEADS.schema)


def _index_rows(workspace: Workspace, state: _State) -> pa.Table:
    rows = []
    samples = indexed_tables(workspace) if state.masks.tombstones.active else {}
    for path in matching(workspace.root / "indexes", "*/index.faiss"):
        manifest = read_manifest(path)
        if manifest is None:  # it is being built
            continue
        served = bool(state.published and state.published.index == workspace.relative(path.parent))
        about = read_index_record(path.parent)
        # Indexes of earlier releases do not name their head: of the served one it is known.
        head = about.head or (state.published.head_version if served and state.published else "")
        rows.append(
            {
                "index_version": path.parent.name,
                "head": head,
                "vectors": manifest.rows,
                "size": manifest.size,
                "served": served,
                "stale": state.masks.stale_index(path.parent, samples.get(path.parent.name)),
                "kind": about.kind,
                "recall_at_10": about.recall_at_10,
                "recall_at_100": about.recall_at_100,
                "parent": about.parent,
            }
        )
    return pa.Table.from_pylist(rows, schema=tables.INDEXES.schema)


def _columns(table: Table) -> str:
    return ", ".join(f'"{name}"' for name in table.schema.names)  # quoted: offset is a keyword


def _no_values(table: Table) -> str:
    return ", ".join(f'CAST(NULL AS {duckdb_type(field.type)}) AS "{field.name}"' for field in table.schema)


def _comment(connection: duckdb.DuckDBPyConnection, kind: str, table: Table) -> None:
    connection.execute(f"COMMENT ON {kind} {table.name} IS {literal(table.comment)}")
    for field in table.schema:
        comment = literal(field.metadata[b"comment"].decode())
        connection.execute(f'COMMENT ON COLUMN {table.name}."{field.name}" IS {comment}')
