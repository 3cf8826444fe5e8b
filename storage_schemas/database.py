"""DuckDB in memory over the files of a workspace: a connection, and how paths and types are written in its SQL."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from storage_schemas.commit import read_manifest
from storage_schemas.files import FULL_DISK, AnyPath, file_sha256, matching, temporary_name
from storage_schemas.table import DamagedTable, Table, damaged
from storage_schemas.workspace import Workspace

_NO_EXTENSIONS = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}


def new_connection(
    workspace: Workspace,
    *,
    memory_gigabytes: float | None = None,
    threads: int | None = None,
    spill: str = "",
    database: str = ":memory:",
) -> duckdb.DuckDBPyConnection:
    """Open a database that can read the workspace, wherever it lies. Without `spill` nothing is written to disk."""
    config: dict[str, str | bool | int | float | list[str]] = {**_NO_EXTENSIONS, "temp_directory": spill}
    if memory_gigabytes is not None:
        config["memory_limit"] = f"{memory_gigabytes * 1000:.0f}MB"
    if threads is not None:
        config["threads"] = threads
    connection = duckdb.connect(database, config=config)
    connection.execute("SET enable_progress_bar = false")  # it would stand between the rows that a command prints
    if not isinstance(workspace.root, Path):
        connection.register_filesystem(workspace.root.fs)
    return connection


@contextmanager
def open_database(
    workspace: Workspace, *, memory_gigabytes: float, threads: int
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a connection for work that may be larger than memory: it spills beside the workspace's files.

    Raises:
        DamagedTable: a Parquet file cannot be read.
        OSError: the disk is full.
    """
    local = workspace.root if isinstance(workspace.root, Path) else None
    with tempfile.TemporaryDirectory(prefix=temporary_name("spill-"), dir=local) as spill:
        connection = new_connection(workspace, memory_gigabytes=memory_gigabytes, threads=threads, spill=spill)
        try:
            with damage_explained(workspace):
                yield connection
        except duckdb.IOException as error:
            # DuckDB's errors carry no number.
            for number in FULL_DISK:
                if os.strerror(number) in str(error):
                    raise OSError(number, os.strerror(number)) from error
            raise
        finally:
            connection.close()


# The file that an error names. One that cannot be opened is missing or forbidden, not damaged.
_NAMED = re.compile(r"""(?<!open )file ["']([^"']+\.parquet)["']""", re.IGNORECASE)

_GONE = re.compile(r"""No files found that match the pattern ["']([^"'*]+\.parquet)["']""")


@contextmanager
def damage_explained(workspace: Workspace) -> Iterator[None]:
    """Raise DamagedTable, with the file's name, in place of DuckDB's error where it cannot read a Parquet file."""
    try:
        yield
    except duckdb.Error as error:
        gone = _GONE.search(str(error))
        if gone and gone[1].startswith(location(workspace.root)):
            raise DamagedTable(
                f"{gone[1]} is gone, which the workspace names: bring it back, or `fastgda verify` and then "
                "`fastgda run CONFIG` make it again"
            ) from error
        path = _unreadable(workspace, error)
        if path is None:
            raise
        raise damaged(path, error) from error


def _unreadable(workspace: Workspace, error: duckdb.Error) -> AnyPath | str | None:
    """Return the Parquet file behind an error; None where the error has another cause."""
    text = str(error).split("\n")[0]
    if any(os.strerror(number) in text for number in FULL_DISK):
        return None
    named = _NAMED.search(text)
    if named and isinstance(error, (duckdb.IOException, duckdb.InvalidInputException)):
        return named[1]
    # Some errors of DuckDB's reader name no file.
    return _first_damaged(workspace) if type(error) is duckdb.Error or "corrupt" in text else None


def _first_damaged(workspace: Workspace) -> AnyPath | None:
    """Return a committed Parquet file that is not what its manifest says; None where there is none."""
    for path in matching(workspace.root, "**/*.parquet"):
        manifest = read_manifest(path)
        quarantined = workspace.root / "quarantine" in path.parents
        if manifest is not None and not quarantined and file_sha256(path) != manifest.sha256:
            return path
    return None


def location(path: AnyPath) -> str:
    """Return a path or URL as it stands, for DuckDB."""
    return str(path) if isinstance(path, Path) else f"{path.protocol}://{path.path.lstrip('/')}"


def literal(text: str) -> str:
    """Quote a text for SQL."""
    return "'" + text.replace("'", "''") + "'"


def file_list(paths: Iterable[AnyPath]) -> str:
    """Return an SQL list of files whose names are taken as they stand, brackets and stars included."""
    return "[" + ", ".join(literal(glob.escape(location(path))) for path in paths) + "]"


def parts_glob(folder: AnyPath) -> str:
    """Return an SQL literal for all parts of a folder, whose own name is taken as it stands."""
    return literal(f"{glob.escape(location(folder))}/part-*.parquet")


def rows_of(table: Table, files: str) -> str:
    """Return SQL for the rows of a table's files, a list or a glob, with defaults for columns that a file lacks."""
    if not table.added:
        return f"read_parquet({files})"
    columns = []
    for field in table.schema:
        kind, default = literal(duckdb_type(field.type)), default_value(table, field.name)
        columns.append(
            f"{literal(field.name)}: {{name: {literal(field.name)}, type: {kind}, default_value: {default}}}"
        )
    return f"read_parquet({files}, schema = MAP {{{', '.join(columns)}}})"


def default_value(table: Table, column: str) -> str:
    """SQL for what rows of a file that lacks the column have in it."""
    default = table.added[column].default if column in table.added else None
    return "NULL" if default is None else literal(str(default))


def allowed_folders(root: AnyPath) -> str:
    """Return an SQL list of the one folder that may be read."""
    # Paths are compared before globs are resolved: the root is named both as it stands and as views write it.
    place = location(root)
    names = {place, glob.escape(place)}
    if not isinstance(root, Path):  # some file systems of fsspec answer with a slash more, which DuckDB 2 compares
        names |= {name.replace("://", ":///", 1) for name in names}
    return "[" + ", ".join(literal(f"{name}/") for name in sorted(names)) + "]"


_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int64(): "BIGINT",
    pa.int32(): "INTEGER",
    pa.float64(): "DOUBLE",
    pa.float32(): "FLOAT",
    pa.timestamp("us", tz="UTC"): "TIMESTAMPTZ",
}


def duckdb_type(arrow: pa.DataType) -> str:
    return f"{duckdb_type(arrow.value_type)}[]" if pa.types.is_list(arrow) else _TYPES[arrow]


def half_the_memory() -> float:
    """Return the gigabytes that a person's SQL may take unless told otherwise: half of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2e9
