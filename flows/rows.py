"""A person's SQL on its way in, and its rows on their way out."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastgda_core.errors import UsageError


class TableFormat(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


StatementArgument = Annotated[
    str, typer.Argument(help="One SELECT statement; `-` reads it from standard input, `@FILE` from a file.")
]
FormatOption = Annotated[TableFormat, typer.Option(help="How to print the rows.")]
OutputOption = Annotated[Path | None, typer.Option(help="File to write; needed for parquet.")]
MemoryOption = Annotated[float | None, typer.Option(min=0.1, help="Gigabytes to use; half of the machine's.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads to use; all cores.")]


def print_query(query: Callable[[str], Any], statement: str, format: TableFormat, output: Path | None) -> None:
    """Run a statement, given as on the command line, and write its rows."""
    import duckdb

    if format is TableFormat.parquet and output is None:
        raise UsageError("--format parquet needs --output FILE")
    try:
        rows = query(_statement(statement))
    except duckdb.Error as error:
        raise UsageError(str(error)) from error
    _write_rows(rows, format, output)


def _statement(given: str) -> str:
    if given == "-":
        return sys.stdin.read()
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{given[1:]}: {error}") from error


def _write_rows(rows: Any, format: TableFormat, output: Path | None) -> None:
    if format is TableFormat.parquet:
        import pyarrow.parquet as pq

        pq.write_table(rows, output)
        return
    stream = output.open("w", newline="", encoding="utf-8") if output else sys.stdout
    try:
        if format is TableFormat.json:
            json.dump(rows.to_pylist(), stream, default=_plain, ensure_ascii=False, indent=2)
            stream.write("\n")
        elif format is TableFormat.csv:
            writer = csv.writer(stream)
            writer.writerow(rows.column_names)
            writer.writerows([_plain(value) for value in row.values()] for row in rows.to_pylist())
        else:
            table = Table(*rows.column_names)
            for row in rows.to_pylist():
                table.add_row(*(str(_plain(value)) for value in row.values()))
            Console(file=stream).print(table, markup=False)
    finally:
        if output:
            stream.close()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
