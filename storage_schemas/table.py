"""A table's columns, versions and comments."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, read_whole


class DamagedTable(StoreError, ValueError):
    """A file of a table cannot be read: it is damaged, or of a version that this release does not know."""


def damaged(path: AnyPath | str, error: Exception) -> DamagedTable:
    """Return an error of one line, without signs that a damaged file puts into messages and a terminal might obey."""
    why = "".join(sign for sign in str(error).split("\n")[0] if sign.isprintable())
    return DamagedTable(f"{path} is damaged ({why}): `fastgda verify` quarantines what must be made again")


def read_native(path: AnyPath) -> pa.Buffer:
    """Return the content of a file, in memory that Arrow owns.

    What Python owns, files or bytes, Arrow's threads give back under Python's lock. Where the process ends at that
    instant, it dies: "terminate called without an active exception".
    """
    if isinstance(path, Path):
        with pa.OSFile(str(path)) as file:
            return file.read_buffer()
    sink = pa.BufferOutputStream()
    sink.write(read_whole(path))
    return sink.getvalue()


def open_native(path: AnyPath) -> pa.NativeFile:
    """Open a file for Arrow; see `read_native`. An object comes as a whole, in one request."""
    return pa.OSFile(str(path)) if isinstance(path, Path) else pa.BufferReader(read_native(path))


def read_stored(source: pa.NativeFile | BinaryIO, names: Sequence[str], chosen: pc.Expression | None) -> pa.Table:
    """Read columns of a Parquet file; one of Python, which is read in this thread alone, cannot choose rows."""
    if isinstance(source, pa.NativeFile):
        return pq.read_table(source, columns=names, filters=chosen, page_checksum_verification=True)
    assert chosen is None
    file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
    return file.read(columns=names, use_threads=False)


@dataclass(frozen=True)
class Added:
    """A column that earlier files lack: the version that brought it, and what their rows have in it."""

    version: int
    default: bool | int | float | str | None


@dataclass(frozen=True, eq=False)
class Table:
    """One table: its name in SQL, what a row is, its columns, and the settings of its Parquet files."""

    name: str
    comment: str
    schema: pa.Schema
    sorted_by: tuple[str, ...] = ()
    """Order of the rows within a file."""
    dictionary: tuple[str, ...] = ()
    """Columns of few distinct values."""
    delta: tuple[str, ...] = ()
    """Integer columns stored as differences: dense ids, half the bytes and half the time of a dictionary."""
    split: tuple[str, ...] = ()
    """Lists of floats whose bytes are stored by place, all first bytes first: smaller, and read five times as fast."""
    row_group_rows: int = 122_880  # DuckDB's: what one of its threads takes at a time
    version: int = 2
    """Version of the files that are written."""
    oldest: int = 2
    """The earliest version whose files are read; part of input keys."""
    added: Mapping[str, Added] = field(default_factory=dict)
    """Columns that came after the oldest version, by name."""

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of each of its files."""
        return {"schema_version": str(self.version)}

    @property
    def _encodings(self) -> dict[str, str]:
        elements = [f"{name}.list.element" for name in self.split]
        return dict.fromkeys(self.delta, "DELTA_BINARY_PACKED") | dict.fromkeys(elements, "BYTE_STREAM_SPLIT")

    def rows(self, **columns: Any) -> pa.Table:
        """Build a table of these columns, in any order; one of `added` that is not given has its default.

        Raises:
            TypeError: a column is missing or unknown.
        """
        names = set(self.schema.names)
        if not names - self.added.keys() <= columns.keys() <= names:
            raise TypeError(f"{self.name} has the columns {self.schema.names}, given were {sorted(columns)}")
        given = {name: pa.array(values, self.schema.field(name).type) for name, values in columns.items()}
        return self.filled(pa.table(given), self.schema.names)

    def filled(self, rows: pa.Table, names: Sequence[str]) -> pa.Table:
        """These columns of the table, with defaults for those that the rows lack."""
        schema = pa.schema([self.schema.field(name) for name in names])
        columns = [
            rows[field.name]
            if field.name in rows.schema.names
            else pa.repeat(pa.scalar(self.added[field.name].default, field.type), rows.num_rows)
            for field in schema
        ]
        return pa.Table.from_arrays(columns, names=schema.names).cast(schema)

    def encode(self, rows: pa.Table, metadata: Mapping[str, str]) -> pa.Buffer:
        """Return the bytes of a Parquet file, with `metadata` beside the schema version."""
        if self.sorted_by:
            rows = rows.take(pc.sort_indices(rows, [(name, "ascending") for name in self.sorted_by]))
        sink = pa.BufferOutputStream()
        with self._writer(sink, metadata) as writer:
            writer.write_table(rows.cast(writer.schema), row_group_size=self.row_group_rows)
        return sink.getvalue()

    def write(self, path: Path, pieces: Iterable[pa.Table], metadata: Mapping[str, str]) -> None:
        """Write pieces of a table, which come in its order, to one Parquet file; no more than a row group is held."""
        with self._writer(str(path), metadata) as writer:
            held: list[pa.Table] = []
            for piece in pieces:
                held.append(piece)
                if sum(each.num_rows for each in held) >= self.row_group_rows:
                    writer.write_table(pa.concat_tables(held).cast(writer.schema), row_group_size=self.row_group_rows)
                    held = []
            if held:
                writer.write_table(pa.concat_tables(held).cast(writer.schema), row_group_size=self.row_group_rows)

    def _writer(self, where: Any, metadata: Mapping[str, str]) -> pq.ParquetWriter:
        schema = self.schema.with_metadata({**self.metadata, **metadata})
        return pq.ParquetWriter(
            where,
            schema,
            compression="zstd",
            use_dictionary=list(self.dictionary),
            column_encoding=self._encodings or None,
            sorting_columns=[pq.SortingColumn(schema.names.index(name)) for name in self.sorted_by] or None,
            write_statistics=True,
            write_page_checksum=True,
        )


def schema(*fields: tuple[str, pa.DataType, str], nullable: Collection[str] = ()) -> pa.Schema:
    """Build a schema of columns (name, type, meaning), and the names of those that may be without a value."""
    return pa.schema(
        [
            pa.field(name, kind, nullable=name in nullable, metadata={"comment": comment})
            for name, kind, comment in fields
        ]
    )
