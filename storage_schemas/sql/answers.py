"""The answer to one query, in a form that costs little memory however many rows it has.

DuckDB itself makes the text of a row. The first rows, their number, lines of CSV or JSON, or batches for Parquet are
read from it, and the query runs anew for each of these.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.database import literal

BATCH_ROWS = 2048  # DuckDB's own: few, as one of them may hold an image
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 122_880, 64 << 20  # a row group is written when it has as much of one of them
_NESTED = ("STRUCT", "MAP", "UNION")
_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")


@dataclass(frozen=True)
class Answer:
    """A checked query on an open connection, which reads one thing at a time.

    Args:
        attempt: calls a function that starts a query, perhaps several times.
    """

    connection: duckdb.DuckDBPyConnection
    statement: duckdb.Statement
    relation: duckdb.DuckDBPyRelation
    attempt: Callable[[Callable[[], Any]], Any] = lambda start: start()

    @property
    def is_plan(self) -> bool:
        """True if the rows are an EXPLAIN's."""
        return bool(self.statement.type == duckdb.StatementType.EXPLAIN)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, the second `a` as `a_1`."""
        names: list[str] = []
        for name in self.relation.columns:
            taken = {other.lower() for other in names}
            choices = (name, *(f"{name}_{number}" for number in range(1, len(names) + 1)))
            names.append(next(choice for choice in choices if choice.lower() not in taken))
        return names

    @property
    def types(self) -> list[str]:
        return [str(kind) for kind in self.relation.types]

    def table(self) -> pa.Table:
        """Return all rows, in memory."""
        found: pa.Table = self.attempt(self.relation.to_arrow_table)
        return found

    def first(self, rows: int) -> list[tuple[str | None, ...]]:
        """Return the first rows as text, None for NULL."""
        texts = ", ".join(_text(place, kind) for place, kind in self._fields())
        found: list[tuple[str | None, ...]] = self._run(lambda: self._select(texts).limit(rows).fetchall())
        return found

    def count(self, seconds: float) -> int | None:
        """Return how many rows there are; None where counting takes longer than this."""
        timer = threading.Timer(seconds, self.connection.interrupt)
        timer.start()
        try:
            counted = self._run(lambda: self._unordered().query("answer", "SELECT count(*) FROM answer").fetchall())
            return int(counted[0][0])
        except duckdb.InterruptException:
            return None
        finally:
            timer.cancel()

    def _unordered(self) -> duckdb.DuckDBPyRelation:
        """Return the same rows without the query's last ORDER BY, a sort of all of them, which changes no count."""
        try:
            text = self.connection.execute("SELECT json_serialize_sql(?)", [self.statement.query]).fetchall()[0][0]
            tree = json.loads(text)
            node = tree["statements"][0]["node"]
            node["modifiers"] = [each for each in node["modifiers"] if each["type"] != "ORDER_MODIFIER"]
            text = self.connection.execute("SELECT json_deserialize_sql(?)", [json.dumps(tree)]).fetchall()[0][0]
            return self.connection.sql(text)
        except (KeyError, IndexError, duckdb.Error):  # not every query can be taken apart
            return self.relation

    def csv(self, limit: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes of a CSV file (RFC 4180, but LF ends a line) in pieces of whole lines; NULL is empty."""
        yield memoryview((",".join(map(_quoted_field, self.columns)) + "\n").encode())
        fields = ", ',', ".join(_csv_field(place, kind) for place, kind in self._fields())
        if len(self.columns) == 1:  # an empty line would be no row
            fields = f"coalesce(nullif({fields}, ''), '\"\"')"
        yield from self._lines(f"concat({fields}, chr(10))", limit)

    def json(self, limit: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes of a JSON array with one object a line, in pieces."""
        yield memoryview(b"[")
        parts: list[str] = []
        for name, (place, kind) in zip(self.columns, self._fields(), strict=True):
            parts.append(literal(f"{', ' if parts else ''}{json.dumps(name, ensure_ascii=False)}: "))
            parts.append(_json(place, kind))
        empty = True
        for objects in self._lines(f"concat(',', chr(10), '{{', {', '.join(parts)}, '}}')", limit):
            yield objects[1:] if empty else objects  # nothing comes before the first one's comma
            empty = False
        yield memoryview(b"]\n" if empty else b"\n]\n")

    def write_parquet(self, path: Path, limit: int | None = None) -> None:
        """Write a Parquet file, one row group after the other."""
        names = ", ".join('"' + name.replace('"', '""') + '"' for name in self.columns)
        schema, batches = self._batches("*", limit, names)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            group: list[pa.RecordBatch] = []
            rows = size = 0
            for batch in batches:
                group.append(batch)
                rows, size = rows + batch.num_rows, size + batch.nbytes
                if rows >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
                    writer.write_table(pa.Table.from_batches(group), row_group_size=rows)
                    group, rows, size = [], 0, 0
            if group:
                writer.write_table(pa.Table.from_batches(group))

    def _run(self, start: Callable[[], Any]) -> Any:
        try:
            return self.attempt(start)
        except duckdb.Error as error:
            raise type(error)(_without_our_sql(error)) from None

    def _fields(self) -> Iterator[tuple[str, str]]:
        """Return each column by the name that `_select` gives it, and its type."""
        return ((f"c{number}", kind) for number, kind in enumerate(self.types))

    def _select(self, expressions: str, names: str = "") -> duckdb.DuckDBPyRelation:
        """Select from the relation with its columns under names of ours, as two of its own may be equal."""
        names = names or ", ".join(place for place, _ in self._fields())
        return self.relation.query("answer", f"SELECT {expressions} FROM answer AS answer({names})")

    def _batches(
        self, expressions: str, limit: int | None, names: str = ""
    ) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        def start() -> pa.RecordBatchReader:
            chosen = self._select(expressions, names)
            return (chosen if limit is None else chosen.limit(limit)).to_arrow_reader(BATCH_ROWS)

        reader = self._run(start)
        return reader.schema, _read(reader)

    def _lines(self, line: str, limit: int | None) -> Iterator[memoryview]:
        """Yield the texts of all rows, end to end as they lie in each batch."""
        for batch in self._batches(line, limit)[1]:
            texts = batch.column(0)
            if not len(texts):
                continue
            _, places, content = texts.buffers()
            first, last = (memoryview(places).cast("i")[texts.offset + row] for row in (0, len(texts)))
            yield memoryview(content)[first:last]


def _read(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a reader; raise its errors as the database's."""
    try:
        yield from reader
    except (OSError, pa.ArrowException) as error:
        raise duckdb.InvalidInputException(_without_our_sql(error)) from None


def _without_our_sql(error: Exception) -> str:
    """Return what DuckDB says, without the line of SQL that it quotes: the reader did not write that line."""
    return str(error).split("\n\nLINE ")[0]


def _text(place: str, kind: str) -> str:
    """Return SQL for a value as text, NULL for NULL."""
    if kind == "BLOB":
        return f"'<' || octet_length({place}) || ' bytes>'"
    if kind.startswith(_NESTED) or kind.endswith("]"):
        return f"CAST(to_json({place}) AS VARCHAR)"
    return f"CAST({place} AS VARCHAR)"


def _csv_field(place: str, kind: str) -> str:
    text = _text(place, kind)
    if kind in (*_NUMBERS, "FLOAT", "DOUBLE", "BOOLEAN"):
        return text
    signs = " OR ".join(f"contains({text}, {sign})" for sign in ("'\"'", "','", "chr(10)", "chr(13)"))
    quoted = f"""'"' || replace({text}, '"', '""') || '"'"""
    return f"CASE WHEN {signs} THEN {quoted} ELSE {text} END"


def _quoted_field(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if set(name) & set('",\r\n') else name


def _json(place: str, kind: str) -> str:
    """Return SQL for a value as JSON text; what JSON has no number for (nan, inf) is null."""
    value = f"to_json({_text(place, kind)})" if kind == "BLOB" else f"to_json({place})"
    if kind in ("FLOAT", "DOUBLE"):
        value = f"CASE WHEN isfinite({place}) THEN {value} END"
    return f"coalesce(CAST({value} AS VARCHAR), 'null')"
