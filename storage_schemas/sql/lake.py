"""A lake for many hosts: committed score shards are registered, not copied, in a DuckLake that many write and read.

A DuckLake is a catalog in SQL, here in SQLite or PostgreSQL, over Parquet files where they lie. Each change of it is a
snapshot with a number, and any of them can be read again. Here it has one table a run (`runs."<run>"`, of the columns
of `tables.SCORES`) and `registered`, which says what file each shard is.

A shard is registered once, also where several writers try: every transaction that registers also updates the one row
of `turns`, so of two that overlap DuckLake refuses the second, which then looks again at what is registered.

Needs the extra `lake`. DuckDB takes extensions that were built for its own version only; pip has them for 1.5.5 and
not yet for 2.0.0, so the extra holds DuckDB at 1.5.5, while everything else here runs on both.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from storage_schemas import tables
from storage_schemas.commit import Manifest, read_manifest, worker_name
from storage_schemas.database import (
    allowed_folders,
    default_value,
    duckdb_type,
    half_the_memory,
    literal,
    location,
    new_connection,
)
from storage_schemas.files import remove, write_atomically
from storage_schemas.runs.attempts import ShardState
from storage_schemas.runs.ledger import read_ledger, read_run, run_names
from storage_schemas.sql.answers import Answer
from storage_schemas.sql.lake_writers import LakeConflict, LakeUnavailable, catalog_fault, patiently, without_password
from storage_schemas.sql.masks import Masks
from storage_schemas.sql.views import RefusedStatement, single_query
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace

log = logging.getLogger("fastgda.lake")
SHARDS_AT_ONCE = 500  # of one transaction
_OWN_NAMES = {"sqlite": "sqlite_scanner", "postgres": "postgres_scanner"}  # by which DuckDB knows extensions
# Words by which a statement would reach the catalog itself or other databases. They are refused in quoted texts, too:
# nothing is lost by that, and no way around is left.
_REFUSED = re.compile(r"\w*(sqlite|postgres|ducklake)_\w*|\bquery(_table)?\b", re.IGNORECASE)
_CATALOG = re.compile(r"(sqlite|postgres):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Lake:
    """A catalog over one workspace.

    Args:
        catalog: `sqlite:FILE`, or `postgres:` and a libpq connection string (`postgres:host=db dbname=lake`), whose
            password comes from PGPASSWORD or a password file.
    """

    workspace: Workspace
    catalog: str

    def __post_init__(self) -> None:
        if not _CATALOG.fullmatch(self.catalog):
            raise LakeUnavailable(
                "a catalog is sqlite:FILE or postgres:CONNECTION, as in sqlite:/data/lake.sqlite or "
                f"'postgres:host=db dbname=lake', not {without_password(self.catalog)!r}"
            )

    @property
    def _kind(self) -> str:
        return self.catalog.partition(":")[0]

    @contextmanager
    def _attached(self, options: str = "", **limits: float | int | None) -> Iterator[duckdb.DuckDBPyConnection]:
        connection = new_connection(self.workspace, **limits)  # type: ignore[arg-type]  # memory_gigabytes, threads
        try:
            # DuckLake asks for httpfs where the data lie in S3; the files are read through fsspec all the same.
            in_s3 = location(self.workspace.root).startswith(("s3://", "s3a://"))
            for extension in (self._kind, "ducklake", *(["httpfs"] if in_s3 else [])):
                _load_extension(connection, extension)
            # Retries of whole transactions are ours: each looks anew at what is registered.
            connection.execute("SET ducklake_max_retry_count = 0")
            data = literal(location(self.workspace.root / "lake") + "/")
            attach = f"ATTACH {literal('ducklake:' + self.catalog)} AS lake (DATA_PATH {data}{options})"
            try:
                patiently(lambda: connection.execute(attach))  # the first process makes the catalog's tables
            except duckdb.Error as error:
                raise LakeUnavailable(catalog_fault(self.catalog, error)) from None
            yield connection
        finally:
            connection.close()

    def add(self, run: str, *, advance: Callable[[int], None] = lambda shards: None) -> int:
        """Register the committed shards of a run that are not registered yet; the run may still be growing.

        `vacuum` leaves the shards of a registered run where they are.

        Args:
            advance: called with the number of shards that were registered.

        Returns:
            How many were registered.

        Raises:
            LakeConflict: a registered shard was scored anew since, or other writers left no room for `PATIENCE`.
            LakeUnavailable: the extra `lake` is not installed, or the catalog cannot be opened.
            UnknownRun: there is no such run.
        """
        shards = self._committed(run)
        write_atomically(self.workspace.lake_marker(run), b"vacuum leaves the score shards of this run\n")
        added = 0
        with self._attached() as connection:
            self._transact(connection, lambda: _create_tables(connection, run))
            while True:
                done = self._transact(connection, lambda: self._register(connection, run, shards))
                if not done:
                    return added
                added += done
                advance(done)

    def remove(self, run: str) -> None:
        """Take a run out of the lake in one step; its files stay, and older snapshots still show it while they do.

        Raises:
            LakeConflict: it is not registered.
        """

        def drop() -> int:
            name = _quoted(run)
            if run not in (_runs(connection) or ()):
                raise LakeConflict(f"run {run} is not in this lake")
            connection.execute("UPDATE lake.turns SET turn = turn + 1")
            connection.execute("DELETE FROM lake.registered WHERE run = ?", [run])
            connection.execute(f"DROP TABLE lake.runs.{name}")
            _describe(connection, f"run {run} removed")
            return 1

        with self._attached() as connection:
            self._transact(connection, drop)
        remove(self.workspace.lake_marker(run))

    def query(
        self,
        statement: str,
        *,
        at: int | None = None,
        memory_gigabytes: float | None = None,
        threads: int | None = None,
    ) -> pa.Table:
        """Run one read-only statement over the lake: `run_scores`, `registered`, `snapshots`.

        Args:
            at: number of the snapshot to read; the newest unless given.

        Raises:
            LakeUnavailable: there is no such catalog or snapshot, or the extra is not installed.
            RefusedStatement: several statements, or one that is no query.
            duckdb.Error: the query is wrong.
        """
        with self.ask(statement, at=at, memory_gigabytes=memory_gigabytes, threads=threads) as answer:
            return answer.table()

    @contextmanager
    def ask(
        self,
        statement: str,
        *,
        at: int | None = None,
        memory_gigabytes: float | None = None,
        threads: int | None = None,
    ) -> Iterator[Answer]:
        """Run one statement as `query` does, for rows that need not fit into memory: they are read inside the block."""
        options = ", READ_ONLY" + (f", SNAPSHOT_VERSION {int(at)}" if at is not None else "")
        limits = {"memory_gigabytes": memory_gigabytes or half_the_memory(), "threads": threads}
        with self._attached(options, **limits) as connection:
            patiently(lambda: _create_views(self.workspace, connection))
            connection.execute(f"SET allowed_directories = {allowed_folders(self.workspace.root)}")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            refused = _REFUSED.search(statement)
            if refused:
                raise RefusedStatement(f"{refused[0]!r} is refused: only the views of the lake are read")
            checked = single_query(connection, statement)
            yield Answer(connection, checked, patiently(lambda: connection.sql(checked)), patiently)

    def _committed(self, run: str) -> dict[int, Manifest]:
        ledger = read_ledger(self.workspace, run).to_pydict()
        found = {}
        for shard, state in zip(ledger["shard"], ledger["state"], strict=True):
            path = self.workspace.score_shard(run, shard)
            manifest = read_manifest(path) if state == ShardState.done else None
            if manifest is not None:
                if not path.exists():
                    raise LakeConflict(
                        f"{self.workspace.relative(path)} was vacuumed, so it cannot be registered: add a run to a "
                        "lake before its first vacuum"
                    )
                found[shard] = manifest
        return found

    def _register(self, connection: duckdb.DuckDBPyConnection, run: str, shards: dict[int, Manifest]) -> int:
        """Register the next shards that are not, in the open transaction; return how many, 0 when all are."""
        rows = connection.execute("SELECT shard, sha256 FROM lake.registered WHERE run = ?", [run]).fetchall()
        there = dict(rows)
        for shard, manifest in shards.items():
            if there.get(shard, manifest.sha256) != manifest.sha256:
                raise LakeConflict(
                    f"shard {shard} of run {run} was scored anew since it was registered: "
                    f"{command(self.workspace, f'lake remove {run}')}, then add it again"
                )
        chosen = [shard for shard in shards if shard not in there][:SHARDS_AT_ONCE]
        if not chosen:
            return 0
        connection.execute("UPDATE lake.turns SET turn = turn + 1")
        workspace = Workspace.at(self.workspace.root)  # whose paths mean the same in every process
        paths = [workspace.score_shard(run, shard) for shard in chosen]
        for path in paths:
            connection.execute(
                f"CALL ducklake_add_data_files('lake', {literal(run)}, {literal(location(path))}, schema => 'runs', "
                f"allow_missing => {bool(tables.SCORES.added)})"
            )
        registered = pa.table(
            {
                "run": [run] * len(chosen),
                "shard": pa.array(chosen, pa.int32()),
                "rows": [shards[shard].rows for shard in chosen],
                "sha256": [shards[shard].sha256 for shard in chosen],
                "path": [workspace.relative(path) for path in paths],
            }
        )
        connection.register("given", registered)
        connection.execute("INSERT INTO lake.registered SELECT * FROM given")
        _describe(connection, f"run {run}: {len(chosen)} shards")
        return len(chosen)

    def _transact(self, connection: duckdb.DuckDBPyConnection, work: Callable[[], int]) -> int:
        """Run `work` in a transaction, again from the start while other writers come between."""

        def once() -> int:
            try:
                connection.execute("BEGIN")
                done = work()
                connection.execute("COMMIT")
                return done
            except BaseException:
                _roll_back(connection)
                raise

        try:
            return patiently(once)
        except duckdb.Error as error:
            raise LakeUnavailable(catalog_fault(self.catalog, error)) from None


def _load_extension(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Load an extension out of its pip package; nothing is fetched and nothing is installed anywhere."""
    found = importlib.util.find_spec(f"duckdb_extension_{name}")
    package = Path(found.origin).parent if found is not None and found.origin else Path("absent")
    path = package / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
    if not path.exists():
        raise LakeUnavailable(
            f"the extension {name} for DuckDB {duckdb.__version__} is not installed: pip install 'fastgda[lake]', "
            "which brings the DuckDB that has it"
        )
    with tempfile.TemporaryDirectory() as folder:
        # DuckDB takes the name of the file for the extension's own.
        link = Path(folder) / f"{_OWN_NAMES.get(name, name)}.duckdb_extension"
        link.symlink_to(path)
        connection.execute(f"LOAD {literal(str(link))}")


def _create_tables(connection: duckdb.DuckDBPyConnection, run: str) -> int:
    """Create what the run's next shards need in a lake: a table of all columns of scores; return 1 if it made any."""
    runs, name = _runs(connection), f"lake.runs.{_quoted(run)}"
    if runs is None:
        connection.execute("CREATE SCHEMA lake.runs")
        connection.execute("CREATE TABLE lake.turns (turn BIGINT)")
        connection.execute("INSERT INTO lake.turns VALUES (0)")
        connection.execute(
            "CREATE TABLE lake.registered (run VARCHAR, shard INTEGER, rows BIGINT, sha256 VARCHAR, path VARCHAR)"
        )
    there = (runs or {}).get(run, set())
    missing = [field for field in tables.SCORES.schema if field.name not in there]
    if not missing:
        return 0
    if not there:
        connection.execute(f"CREATE TABLE {name} ({', '.join(map(_column, missing))})")
    for field in missing:
        if there:
            connection.execute(f"ALTER TABLE {name} ADD COLUMN {_column(field)}")
        comment = literal(field.metadata[b"comment"].decode())
        connection.execute(f"COMMENT ON COLUMN {name}.{field.name} IS {comment}")
    _describe(connection, f"run {run} has more columns" if there else f"run {run} created")
    return 1


def _column(field: pa.Field) -> str:
    return f"{field.name} {duckdb_type(field.type)} DEFAULT {default_value(tables.SCORES, field.name)}"


def _runs(connection: duckdb.DuckDBPyConnection) -> dict[str, set[str]] | None:
    """Return the columns of each run in the lake, by its name; None where nothing was ever added to it."""
    rows = connection.execute(
        "SELECT schema_name, table_name, column_name FROM duckdb_columns() WHERE database_name = 'lake'"
    ).fetchall()
    if ("main", "registered", "run") not in rows:
        return None
    found: dict[str, set[str]] = {}
    for _, run, column in sorted(row for row in rows if row[0] == "runs"):
        found.setdefault(run, set()).add(column)
    return found


def _create_views(workspace: Workspace, connection: duckdb.DuckDBPyConnection) -> None:
    runs, masks = _runs(connection), Masks(workspace)
    if not runs:
        raise LakeUnavailable("the lake holds no run at this snapshot: `fastgda lake add RUN` first")
    known = set(run_names(workspace)) if masks.tombstones.active else runs.keys()
    if unknown := sorted(runs.keys() - known):
        log.warning(
            "rows of %s are left out: their run.json is gone, so nobody knows which are about images taken down",
            ", ".join(unknown),
        )
    selects = [
        f"SELECT {literal(run)} AS run, {_scores(there)} FROM lake.runs.{_quoted(run)}"
        + _masked(workspace, masks, run, known=run in known)
        for run, there in runs.items()
    ]
    connection.execute(f"CREATE OR REPLACE VIEW run_scores AS {' UNION ALL '.join(selects)}")
    connection.execute("CREATE OR REPLACE VIEW registered AS FROM lake.registered")
    connection.execute("""
        CREATE OR REPLACE VIEW snapshots AS
        SELECT snapshot_id AS snapshot, snapshot_time AS created_at, author, commit_message AS change
        FROM ducklake_snapshots('lake')
    """)


def _masked(workspace: Workspace, masks: Masks, run: str, *, known: bool) -> str:
    """Return an SQL condition that leaves out a run's rows about removed samples; all where nobody knows which."""
    if not masks.tombstones.active:
        return ""
    return masks.of(read_run(workspace, run).samples).rows(tables.SCORES) if known else " WHERE false"


def _scores(there: set[str]) -> str:
    """SQL for the columns of scores, out of a table that may be older than some of them."""
    return ", ".join(
        field.name
        if field.name in there
        else f"CAST({default_value(tables.SCORES, field.name)} AS {duckdb_type(field.type)}) AS {field.name}"
        for field in tables.SCORES.schema
    )


def _describe(connection: duckdb.DuckDBPyConnection, message: str) -> None:
    connection.execute(f"CALL lake.set_commit_message({literal(worker_name())}, {literal(message)})")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _roll_back(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        connection.execute("ROLLBACK")
    except duckdb.Error:
        return  # a commit that failed has ended the transaction
