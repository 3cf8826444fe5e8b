"""A table's columns, versions and comments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath

NULLABLE = {"finished_at", "best_epoch", "validation_map"}


class DamagedTable(StoreError, ValueError):
    """A file of a table cannot be read: it is damaged, or of a version that this release does not know."""


def damaged(path: AnyPath | str, error: Exception) -> DamagedTable:
    """A line for people, without what a damaged file puts into messages and a terminal might obey."""
    why = "".join(sign for sign in str(error).split("\n")[0] if sign.isprintable())
    return DamagedTable(f"{path} is damaged ({why}): `fastgda verify` quarantines what must be made again")


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
    row_group_rows: int = 122_880  # DuckDB's: what one of its threads takes at a time
    version: int = 2
    """Of the files that are written."""
    oldest: int = 2
    """The earliest version whose files are read; part of input keys."""
    added: Mapping[str, Added] = field(default_factory=dict)
    """Columns that came after the oldest version, by name."""

    @property
    def metadata(self) -> dict[str, str]:
        """What each of its files says of itself."""
        return {"schema_version": str(self.version)}

    def rows(self, **columns: Any) -> pa.Table:
        """A table of these columns, which are exactly those of the schema, in any order.

        Raises:
            TypeError: a column is missing or unknown.
        """
        if columns.keys() != set(self.schema.names):
            raise TypeError(f"{self.name} has the columns {self.schema.names}, given were {sorted(columns)}")
        arrays = [pa.array(columns[field.name], type=field.type) for field in self.schema]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def encode(self, rows: pa.Table, metadata: Mapping[str, str]) -> pa.Buffer:
        """The bytes of a Parquet file, with `metadata` beside the schema version."""
        schema = self.schema.with_metadata({**self.metadata, **metadata})
        if self.sorted_by:
            rows = rows.take(pc.sort_indices(rows, [(name, "ascending") for name in self.sorted_by]))
        sink = pa.BufferOutputStream()
        pq.write_table(
            rows.cast(schema),
            sink,
            compression="zstd",
            use_dictionary=list(self.dictionary),
            column_encoding=dict.fromkeys(self.delta, "DELTA_BINARY_PACKED") or None,
            row_group_size=self.row_group_rows,
            sorting_columns=[pq.SortingColumn(schema.names.index(name)) for name in self.sorted_by] or None,
            write_statistics=True,
            write_page_checksum=True,
        )
        return sink.getvalue()


def schema(*fields: tuple[str, pa.DataType, str]) -> pa.Schema:
    """Columns as (name, type, meaning)."""
    return pa.schema(
        [
            pa.field(name, kind, nullable=name in NULLABLE, metadata={"comment": comment})
            for name, kind, comment in fields
        ]
    )
