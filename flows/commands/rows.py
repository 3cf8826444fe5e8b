"""Read a person's SQL statement, run it, and print its rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from fastgda_core.errors import UsageError
from flows.commands.text_table import print_rows
from tasks.printable import printable

if TYPE_CHECKING:
    from storage_schemas.sql.answers import Answer

TABLE_ROWS = 40
COUNT_SECONDS = 5.0  # of counting the rows that a table leaves out, at most


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
LimitOption = Annotated[
    int | None, typer.Option(min=1, help=f"Rows to write at most; default: {TABLE_ROWS} in a table, else all.")
]
MemoryOption = Annotated[float | None, typer.Option(min=0.1, help="Gigabytes to use; half of the machine's.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads to use; all cores.")]


def print_query(
    asked: Callable[[str], AbstractContextManager[Answer]],
    statement: str,
    format: TableFormat,
    output: Path | None,
    limit: int | None,
) -> None:
    """Run a statement, given as on the command line, and write its rows as they come."""
    import duckdb
    import pyarrow as pa

    from storage_schemas.files import replace_through

    if format is TableFormat.parquet and output is None:
        raise UsageError("--format parquet needs --output FILE")
    if output is not None and output.is_dir():
        raise UsageError(f"--output {output} is a folder: name a file")
    try:
        with asked(_statement(statement)) as answer:
            if output is None:
                _print(answer, format, limit)
            elif output.exists() and not output.is_file():  # a pipe or a device takes rows as they come
                _write(answer, format, limit, output)
            else:
                replace_through(output.resolve(), lambda path: _write(answer, format, limit, path), lambda path: None)
    except duckdb.Error as error:
        raise UsageError(str(error)) from error
    except pa.ArrowException as error:
        raise UsageError(f"{error}: cast that column to another type, or choose another --format") from error
    except RuntimeError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise


def _statement(argument: str) -> str:
    if argument == "-":
        return sys.stdin.read()
    if not argument.startswith("@"):
        return argument
    try:
        return Path(argument[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{argument[1:]}: {error}") from error


def _print(answer: Answer, format: TableFormat, limit: int | None) -> None:
    if format is TableFormat.table:
        _print_table(answer, limit, sys.stdout)
        return
    for lines in answer.csv(limit) if format is TableFormat.csv else answer.json(limit):
        # A program gets each byte as it is stored, a terminal nothing that it would obey.
        shown = printable(bytes(lines).decode(), lines=True).encode() if sys.stdout.isatty() else lines
        sys.stdout.buffer.write(shown)
    sys.stdout.buffer.flush()


def _write(answer: Answer, format: TableFormat, limit: int | None, path: Path) -> None:
    if format is TableFormat.parquet:
        answer.write_parquet(path, limit)
    elif format is TableFormat.table:
        with path.open("w", encoding="utf-8") as stream:
            _print_table(answer, limit, stream)
    else:
        with path.open("wb") as file:
            file.writelines(answer.csv(limit) if format is TableFormat.csv else answer.json(limit))


def _print_table(answer: Answer, limit: int | None, stream: TextIO) -> None:
    """Print the first rows at once, then how many rows there are."""
    limit = TABLE_ROWS if limit is None else limit
    rows = answer.first(limit + 1)
    if answer.is_plan:
        stream.writelines(f"{printable(plan or '', lines=True)}\n" for _, plan in rows)
        return
    cut = print_rows(answer.columns, rows[:limit], stream)
    notes = ["long text is cut, --format json has it whole"] if cut else []
    if len(rows) > limit:
        total = answer.count(COUNT_SECONDS)
        of = f"{total:,} rows" if total is not None else f"more rows than are counted in {COUNT_SECONDS:.0f} s"
        notes.insert(0, f"the first {limit:,} of {of}: --limit N shows more, --format csv has all")
    if notes:
        Console(file=stream, highlight=False).print("; ".join(notes), style="dim", soft_wrap=True)
