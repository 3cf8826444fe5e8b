"""The columns of training samples by which people filter and sum: those of `samples`, and the fields of its metadata.

A name is that of a column of `samples` in upper or lower case, as SQL has it, or else of a field of the tars' .json.
Such a field is a column of its own where its name is a plain one; whatever a name is, `metadata->>'name'` gives the
field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import duckdb

from storage_schemas import tables
from storage_schemas.database import duckdb_type, literal

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")  # nothing else is ever written into SQL
_TYPES = {"BOOLEAN": "BOOLEAN", "UBIGINT": "BIGINT", "BIGINT": "BIGINT", "DOUBLE": "DOUBLE"}  # else text


@dataclass(frozen=True)
class SampleColumn:
    """A column by which samples can be filtered and summed.

    expression: SQL for it over rows of `samples`. comes_with: how many samples have a value; None: all.
    """

    name: str
    type: str
    expression: str
    comes_with: int | None = None


def sample_columns(connection: duckdb.DuckDBPyConnection, source: str) -> list[SampleColumn]:
    """Return all columns by which samples can be filtered and summed; arguments as of `metadata_columns`."""
    own = [field for field in tables.SAMPLES.schema if field.name not in ("image_look", "metadata")]
    return [
        *(SampleColumn(field.name, duckdb_type(field.type), f'"{field.name}"') for field in own),
        *metadata_columns(connection, source),
    ]


def metadata_columns(connection: duckdb.DuckDBPyConnection, source: str) -> list[SampleColumn]:
    """Return the fields of metadata that are columns of their own, those that most samples have first.

    Args:
        connection: of a database.
        source: SQL for rows of the table samples, a name or a query in brackets.
    """
    taken = {name.lower() for (name, *_) in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
    found = connection.execute(
        "SELECT field.key, count(*), list(DISTINCT field.type) "
        f"FROM (SELECT metadata FROM {source} WHERE metadata <> '{{}}'), json_each(metadata) AS field "
        "GROUP BY ALL ORDER BY 2 DESC, 1"
    ).fetchall()
    columns = []
    for name, count, kinds in found:
        if not _PLAIN.fullmatch(name) or name.lower() in taken:
            continue
        taken.add(name.lower())  # names in SQL differ by more than case
        types = {_TYPES.get(kind, "VARCHAR") for kind in kinds}
        kind = types.pop() if len(types) == 1 else "DOUBLE" if types == {"BIGINT", "DOUBLE"} else "VARCHAR"
        text = metadata_text(name)
        columns.append(SampleColumn(name, kind, text if kind == "VARCHAR" else f"CAST({text} AS {kind})", count))
    return columns


def metadata_text(name: str) -> str:
    """Return SQL for the text of a field of metadata, whatever its name is."""
    pointer = "/" + name.replace("~", "~0").replace("/", "~1")
    return f"json_extract_string(metadata, {literal(pointer)})"


def with_columns(connection: duckdb.DuckDBPyConnection, source: str) -> str:
    """Return SQL for rows of samples with a column for each plain field of their metadata."""
    further = [f'{column.expression} AS "{column.name}"' for column in metadata_columns(connection, source)]
    return f"SELECT {', '.join(['*', *further])} FROM {source}"
