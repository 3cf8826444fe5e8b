"""SQL over a workspace: views on the Parquet files where they lie.

`connect` gives a private in-memory database whose views read committed files: it locks nothing and nothing
locks it out. `catalog.duckdb` holds the same views for tools that want a file; it is built under another
name and renamed, so nobody ever opens the published one for writing.

`scores` and `ranks` are the published snapshot: a fixed list of files. `run_scores` shows every run as it grows, and
before anything is published `samples` are those that were indexed last; what was rejected of these is always shown.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from storage_schemas import tables
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
from storage_schemas.files import AnyPath, matching, temporary_name
from storage_schemas.heads.records import check_tables
from storage_schemas.runs.ledger import read_compaction
from storage_schemas.runs.records import Part
from storage_schemas.snapshots.changes import DEFAULT_K, changes_sql
from storage_schemas.snapshots.published import NotPublished, Published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.sql.answers import Answer
from storage_schemas.sql.loaded import loaded_tables
from storage_schemas.sql.shares import shares_macro, shares_view
from storage_schemas.sql.state import State
from storage_schemas.table import Table
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
    state = State.of(workspace)
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
            _create_views(connection, workspace, State.of(workspace))
            connection.commit()
        temporary.replace(workspace.catalog)
    finally:
        temporary.unlink(missing_ok=True)


def _create_views(connection: duckdb.DuckDBPyConnection, workspace: Workspace, state: State) -> None:
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


def _changes(workspace: Workspace, state: State) -> Iterator[str]:
    """Yield SQL for what the newest snapshot changed."""
    if state.snapshot is None or state.published is None or state.published.snapshot_before is None:
        return
    try:
        before = read_snapshot(workspace, state.published.snapshot_before)
    except NotPublished:  # it is gone
        return
    yield f"({changes_sql(workspace, before, state.snapshot, DEFAULT_K, state.masks.tombstones)})"


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


def _run_scores(workspace: Workspace, state: State) -> Iterator[str]:
    for run, record in state.runs.items():
        compaction = read_compaction(workspace, run)
        if compaction is not None:
            source: str | None = file_list(workspace.file(part.path) for part in compaction.parts)
        else:
            source = _parts(workspace.scores(run))
        if source is not None:
            rows = rows_of(tables.SCORES, source)
            shown = state.masks.of(record.samples).rows(tables.SCORES)
            yield f"SELECT {literal(run)} AS run, {_columns(tables.SCORES)} FROM {rows}{shown}"


def _select(table: Table, files: str, rows: str = "") -> str:
    return f"SELECT {rows}{_columns(table)} FROM {rows_of(table, files)}"


def _create_view(connection: duckdb.DuckDBPyConnection, table: Table, selects: Iterable[str]) -> None:
    source = " UNION ALL ".join(selects) or f"SELECT {_no_values(table)} WHERE false"
    connection.execute(f"CREATE VIEW {table.name} AS {source}")
    _comment(connection, "VIEW", table)


def _load(connection: duckdb.DuckDBPyConnection, workspace: Workspace, state: State) -> None:
    for table, rows in loaded_tables(workspace, state).items():
        connection.register("given", rows.cast(table.schema))
        connection.execute(f"CREATE TABLE {table.name} AS SELECT {_columns(table)} FROM given")
        connection.unregister("given")
        _comment(connection, "TABLE", table)


def _columns(table: Table) -> str:
    return ", ".join(f'"{name}"' for name in table.schema.names)  # quoted: offset is a keyword


def _no_values(table: Table) -> str:
    return ", ".join(f'CAST(NULL AS {duckdb_type(field.type)}) AS "{field.name}"' for field in table.schema)


def _comment(connection: duckdb.DuckDBPyConnection, kind: str, table: Table) -> None:
    connection.execute(f"COMMENT ON {kind} {table.name} IS {literal(table.comment)}")
    for field in table.schema:
        comment = literal(field.metadata[b"comment"].decode())
        connection.execute(f'COMMENT ON COLUMN {table.name}."{field.name}" IS {comment}')
