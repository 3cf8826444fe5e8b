"""SQL over a workspace: views on the Parquet files where they lie.

`connect` gives a private in-memory database whose views read the published files: it locks nothing and nothing
locks it out. `catalog.duckdb` holds the same views for tools that want a file; it is built under another
name and renamed, so nobody ever opens the published one for writing.
"""

from __future__ import annotations

import glob
import os
from datetime import datetime
from pathlib import Path

import duckdb
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from storage_schemas import tables
from storage_schemas.commit import Manifest, manifest_path, write_atomically
from storage_schemas.workspace import Workspace


class ShardRecord(BaseModel):
    """One planned score shard, as the ledger shows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: int
    path: str = Field(description="relative to the workspace")
    pairs: int = Field(description="rows that it has when done")


class Published(BaseModel):
    """`current.json`: the files, relative to the workspace, that SQL, `attribute` and the report answer from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    teacher: str
    created_at: datetime
    samples: str
    rejected_samples: str
    queries: str
    candidates: str
    scores: str = Field(description="folder of score shards")
    ranks: str
    exact_check: str | None = Field(default=None, description="folder of pairs that the exact teacher scored too")
    shards: list[ShardRecord]
    metrics: str | None = None
    head: str | None = None
    index: str | None = None
    config: dict[str, object] = Field(description="the pipeline's configuration")


class NotPublished(LookupError):
    """The workspace holds no published run."""


class RefusedStatement(ValueError):
    """SQL that is not a single read-only query."""


def read_published(workspace: Workspace) -> Published:
    """Raises NotPublished when no run of this workspace was published yet."""
    try:
        return Published.model_validate_json(workspace.current.read_bytes())
    except FileNotFoundError:
        raise NotPublished(
            f"{workspace.root} has no published run: run `fastgda demo` or `fastgda run CONFIG` first, "
            "or name another folder with --workspace"
        ) from None


def publish(workspace: Workspace, published: Published) -> None:
    """Make `published` what readers see, in one step, then rebuild the catalog file."""
    write_atomically(workspace.current, published.model_dump_json(indent=2).encode() + b"\n")
    write_atomically(workspace.run(published.run), published.model_dump_json(indent=2).encode() + b"\n")
    temporary = workspace.catalog.with_name(f".{os.getpid()}-catalog.duckdb")
    temporary.unlink(missing_ok=True)
    try:
        with duckdb.connect(str(temporary)) as connection:
            _create_views(connection, workspace, published)
        temporary.replace(workspace.catalog)
    finally:
        temporary.unlink(missing_ok=True)


def connect(root: Path) -> duckdb.DuckDBPyConnection:
    """Open the published state of a workspace for reading, in memory.

    The connection reads files inside the workspace only, and its settings are locked.

    Raises:
        NotPublished: nothing is published there.
    """
    workspace = Workspace(root.resolve())
    published = read_published(workspace)
    connection = duckdb.connect(
        ":memory:", config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    )
    # Paths are compared before globs are resolved: the root is named both as it stands and as views write it.
    roots = {str(workspace.root), glob.escape(str(workspace.root))}
    connection.execute(f"SET allowed_directories = [{', '.join(_literal(f'{root}/') for root in sorted(roots))}]")
    connection.execute("SET enable_external_access = false")
    _create_views(connection, workspace, published)
    connection.execute("SET lock_configuration = true")
    return connection


def query(root: Path, statement: str) -> pa.Table:
    """Run one read-only statement over a workspace.

    Raises:
        NotPublished: nothing is published there.
        RefusedStatement: several statements, or one that is no query.
        duckdb.Error: the query is wrong.
    """
    connection = connect(root)
    statements = connection.extract_statements(statement)
    if len(statements) != 1:
        raise RefusedStatement(f"{len(statements)} statements given: run one query at a time")
    # EXPLAIN is no exception: EXPLAIN ANALYZE runs what it explains.
    if statements[0].type != duckdb.StatementType.SELECT:
        raise RefusedStatement(f"{statements[0].type.name} is refused: the workspace is open for reading only")
    return connection.sql(statements[0]).to_arrow_table()


def _create_views(connection: duckdb.DuckDBPyConnection, workspace: Workspace, published: Published) -> None:
    root = workspace.root.resolve()
    sources: dict[str, tuple[str | None, pa.Schema]] = {
        "samples": (published.samples, tables.SAMPLES),
        "rejected_samples": (published.rejected_samples, tables.REJECTED_SAMPLES),
        "queries": (published.queries, tables.QUERIES),
        "candidates": (published.candidates, tables.CANDIDATES),
        "scores": (f"{published.scores}/part-*.parquet", tables.SCORES),
        "ranks": (published.ranks, tables.RANKS),
        "exact_check": (f"{published.exact_check}/part-*.parquet" if published.exact_check else None, tables.SCORES),
        "metrics": (published.metrics, tables.METRICS),
    }
    for view, (pattern, schema) in sources.items():
        if pattern is None:
            columns = ", ".join(f'CAST(NULL AS {_duckdb_type(field.type)}) AS "{field.name}"' for field in schema)
            source = "(SELECT 1) WHERE false"
        else:
            columns = ", ".join(f'"{field.name}"' for field in schema)  # quoted: offset is a keyword
            source = f"read_parquet({_parquet_glob(root, pattern)})"
        connection.execute(f"CREATE VIEW {view} AS SELECT {columns} FROM {source}")
        for field in schema:
            comment = _literal(field.metadata[b"comment"].decode())
            connection.execute(f'COMMENT ON COLUMN {view}."{field.name}" IS {comment}')
    _create_shards(connection, root, published)


def _create_shards(connection: duckdb.DuckDBPyConnection, root: Path, published: Published) -> None:
    """The ledger: a table, because it is small and made from manifests, not from Parquet."""
    connection.execute(
        "CREATE TABLE shards (run VARCHAR, shard INTEGER, state VARCHAR, device VARCHAR, seconds DOUBLE, rows BIGINT)"
    )
    rows = [_ledger_row(root, published.run, record) for record in published.shards]
    if rows:
        connection.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)", rows)


def _ledger_row(root: Path, run: str, record: ShardRecord) -> tuple[object, ...]:
    try:
        manifest = Manifest.model_validate_json(manifest_path(root / record.path).read_bytes())
    except FileNotFoundError:
        return (run, record.shard, "missing", "", 0.0, 0)
    return (run, record.shard, "done", manifest.device, manifest.seconds, manifest.rows)


def _parquet_glob(folder: Path, pattern: str) -> str:
    """SQL literal of a glob under `folder`, whose own name is taken as it stands."""
    return _literal(f"{glob.escape(str(folder))}/{pattern}")


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def write_ranks(scores: Path, destination: Path) -> None:
    """Rank labels of every score row, computed and streamed to Parquet by DuckDB.

    rank 1 = highest score of the query, ties by train_id; rank_label = rank / candidates of the query.
    """
    columns = ", ".join(f"{field.name}::{_duckdb_type(field.type)} AS {field.name}" for field in tables.RANKS)
    statement = f"""
        COPY (
            SELECT {columns} FROM (
                SELECT *, rank / count(*) OVER (PARTITION BY query_id) AS rank_label FROM (
                    SELECT *, row_number() OVER (PARTITION BY query_id ORDER BY score DESC, train_id) AS rank
                    FROM read_parquet({_parquet_glob(scores, "part-*.parquet")})
                )
            ) ORDER BY query_id, rank
        ) TO {_literal(str(destination))}
        (FORMAT parquet, COMPRESSION zstd, KV_METADATA {{schema_version: {_literal(tables.SCHEMA_VERSION)}}})
    """
    with duckdb.connect(":memory:") as connection:
        connection.execute(statement)


_DUCKDB_TYPES = {
    pa.string(): "VARCHAR",
    pa.int64(): "BIGINT",
    pa.int32(): "INTEGER",
    pa.float64(): "DOUBLE",
    pa.float32(): "FLOAT",
}


def _duckdb_type(arrow: pa.DataType) -> str:
    return f"{_duckdb_type(arrow.value_type)}[]" if pa.types.is_list(arrow) else _DUCKDB_TYPES[arrow]
