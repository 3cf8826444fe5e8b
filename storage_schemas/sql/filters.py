"""Filters of training samples: one SQL expression over the columns of `samples`, that can do nothing but be true.

An expression comes from anybody, over HTTP too. It is parsed by DuckDB itself, and every node of it has to be one that
is known to be harmless: columns, constants, comparisons, plain functions of texts and numbers. What runs is the text
that DuckDB writes of the parsed expression, in a database without access to files, within a limit of time.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage_schemas.errors import StoreError
from storage_schemas.sql.sample_columns import SampleColumn, sample_columns, with_columns

LONGEST = 2000  # characters of an expression
SECONDS = 10.0  # that an expression may take
KEPT = 64  # expressions whose samples are remembered
_CLASSES = {"COLUMN_REF", "CONSTANT", "COMPARISON", "CONJUNCTION", "OPERATOR", "BETWEEN", "CASE", "CAST", "FUNCTION"}
_TYPES = {
    *("VARCHAR", "BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UINTEGER", "UBIGINT", "FLOAT"),
    *("DOUBLE", "DECIMAL", "DATE", "TIMESTAMP", "JSON"),
}
# None of them makes a text that is much longer than what it is given, none reads a file, a setting or a clock, and none
# takes long for one block of rows, within which DuckDB cannot be interrupted.
_OPERATORS = {
    *("+", "-", "*", "/", "//", "%", "!", "||", "->", "->>", "@>", "<@", "&&", "^@", "list_value", "array_extract"),
    *("~~", "!~~", "~~*", "!~~*", "~~~", "like_escape", "not_like_escape", "ilike_escape", "not_ilike_escape"),
}
FUNCTIONS = (
    *("abs", "ceil", "floor", "round", "sqrt", "greatest", "least", "ifnull", "lower", "upper", "trim", "ltrim"),
    *("rtrim", "length", "len", "strlen", "contains", "starts_with", "ends_with", "prefix", "suffix", "substring"),
    *("substr", "left", "right", "split_part", "instr", "strpos", "position", "regexp_matches", "regexp_full_match"),
    *("like_escape", "list_contains", "list_has", "array_contains", "list_has_any", "list_has_all", "array_length"),
    *("list_extract", "list_position", "json_extract", "json_extract_string", "json_exists", "json_contains"),
    *("json_type", "json_valid", "json_array_length", "year", "month", "day", "date_part", "hash"),
)
_HARMLESS = _OPERATORS | set(FUNCTIONS)


class RefusedFilter(StoreError):
    """An expression by which samples cannot be filtered."""


class SampleFilters:
    """Filters of one table of samples; concurrent calls may share it."""

    def __init__(self, samples: pa.Table) -> None:
        self._samples = samples
        self._lock = threading.Lock()  # one at a time: an expression may take all that a machine has
        self._bitmap = functools.lru_cache(maxsize=KEPT)(self._evaluated)

    def bitmap(self, where: str) -> NDArray[np.bool_]:
        """Return whether the expression holds of each sample, (n,), in the order of the table; not to be written to.

        Raises:
            RefusedFilter: it is no expression of these columns, does what a filter must not, or takes too long.
        """
        with self._lock:
            return self._bitmap(where)

    def _evaluated(self, where: str) -> NDArray[np.bool_]:
        expression = checked(where)
        chosen = _within_time(self._connection, f"SELECT train_id FROM samples WHERE {expression}", where)
        found = np.zeros(self._samples.num_rows, np.bool_)
        found[chosen] = True
        found.flags.writeable = False
        return found

    @functools.cached_property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        """A database that holds the samples and can read no file."""
        connection = _closed_database()
        connection.register("stored", self._samples)
        connection.execute(f"CREATE VIEW samples AS {with_columns(connection, 'stored')}")
        return connection

    @functools.cached_property
    def columns(self) -> list[SampleColumn]:
        """The columns that an expression may name, but for `image_look` and `metadata` itself."""
        with self._lock:
            return sample_columns(self._connection, "stored")


def _closed_database() -> duckdb.DuckDBPyConnection:
    closed = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    connection = duckdb.connect(config={"threads": 1, "memory_limit": "1GB", "temp_directory": "", **closed})
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def checked(where: str) -> str:
    """Return an expression as DuckDB writes it, after every node of it was looked at.

    Raises:
        RefusedFilter: it is no single expression, or holds something that is not known to be harmless.
    """
    if len(where) > LONGEST:
        raise RefusedFilter(f"where has {len(where):,} characters: it may have {LONGEST:,}")
    if any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in where):
        raise RefusedFilter("where holds a character that SQL has no way to write: NUL, or half of one")
    # The line breaks keep a comment at its end from what follows.
    parsed: dict[str, Any] = json.loads(_said("json_serialize_sql", f"SELECT (\n{where}\n)"))
    if parsed["error"]:
        raise RefusedFilter(f"where is no SQL expression: {_first_line(parsed.get('error_message', 'it is refused'))}")
    _check(parsed)
    written = _said("json_deserialize_sql", json.dumps(parsed))
    return "(" + written.strip().removeprefix("SELECT").strip().removesuffix(";") + ")"


_parser = functools.cache(_closed_database)


def _said(function: str, text: str) -> str:
    """Return what one of DuckDB's own functions of SQL as JSON says of a text."""
    try:
        row = _parser().cursor().execute(f"SELECT {function}(?)", [text]).fetchone()
    except duckdb.Error as error:
        raise RefusedFilter(f"where is no SQL expression: {_first_line(error)}") from None
    assert row is not None
    return str(row[0])


def _check(parsed: dict[str, Any]) -> None:
    """Raise RefusedFilter unless a statement is SELECT with one expression, and every node of that is harmless."""
    statements = parsed["statements"]
    node = statements[0]["node"] if len(statements) == 1 else {}
    alone = (
        node.get("type") == "SELECT_NODE"
        and len(node["select_list"]) == 1
        and node["from_table"]["type"] == "EMPTY"
        and not node["cte_map"]["map"]
        and not any(node[part] for part in ("modifiers", "group_expressions", "group_sets"))
        and not any(node[part] for part in ("where_clause", "having", "sample", "qualify"))
    )
    if not alone:
        raise RefusedFilter("where has to be one SQL expression, such as \"width > 64 and key like 'a%'\"")
    for part in _nodes(node["select_list"][0]):
        kind = part["class"]
        if kind not in _CLASSES:
            raise RefusedFilter(
                f"where must not hold {_NAMES.get(kind, kind.lower())}: it is one expression of columns"
            )
        if kind == "FUNCTION":
            _check_function(part)
        if kind == "CAST" and part["cast_type"]["id"] not in _TYPES:
            raise RefusedFilter(f"where must not cast to {part['cast_type']['id']}")


_NAMES = {"SUBQUERY": "a query", "WINDOW": "a window function", "STAR": "*", "LAMBDA": "a lambda", "PARAMETER": "?"}


def _check_function(part: dict[str, Any]) -> None:
    name = part["function_name"].lower()
    own = part["schema"] in ("", "main") and part["catalog"] in ("", "system")
    plain = own and not part["distinct"] and part["filter"] is None
    if name not in _HARMLESS or not plain or part["order_bys"]["orders"]:
        raise RefusedFilter(f"where must not call {name}: the functions are {', '.join(FUNCTIONS)}")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every expression of a tree: dicts with a class."""
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            if "class" in here:
                yield here
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here


def _within_time(connection: duckdb.DuckDBPyConnection, statement: str, expression: str) -> NDArray[np.int64]:
    timer = threading.Timer(SECONDS, connection.interrupt)
    timer.start()
    try:
        found: NDArray[np.int64] = connection.execute(statement).fetchnumpy()["train_id"]
        return found
    except duckdb.InterruptException:
        raise RefusedFilter(f"where takes more than {SECONDS:.0f} s: ask for less") from None
    except duckdb.Error as error:
        # DuckDB reads `a AND b->>'c'` as `(a AND b)->>'c'`.
        brackets = " (write (metadata->>'name') in brackets)" if "->" in expression else ""
        raise RefusedFilter(f"where {_first_line(expression)[:200]}: {_first_line(error)}{brackets}") from None
    finally:
        timer.cancel()


def _first_line(error: object) -> str:
    return "".join(sign for sign in str(error).split("\n")[0] if sign.isprintable())[:300]
