"""Print rows for a reader: a table where it fits, and a block of lines for each row where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.printable import SHOWN, cell, printable

PROSE_WIDTH = 20  # letters to a line that text with spaces is folded to, at least
_ENDLESS = 1_000_000


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str | None]], stream: TextIO) -> bool:
    """Print rows of text, None as NULL: ids whole, what a terminal would obey escaped, long text cut.

    Returns:
        Whether some text was cut.
    """
    # Output that another program reads has no width.
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else _ENDLESS)
    names = [Text(cell(name)) for name in columns]
    cells = [[Text("NULL", "dim") if value is None else Text(cell(value)) for value in row] for row in rows]
    of_columns = [[name, *(row[place] for row in cells)] for place, name in enumerate(names)]
    widths = [max(cell_len(text.plain) for text in column) for column in of_columns]
    prose = [any(" " in text.plain for text in column[1:]) for column in of_columns]
    least = sum(min(width, PROSE_WIDTH) if folds else width for width, folds in zip(widths, prose, strict=True))
    if least + 3 * len(columns) + 1 <= console.width:
        table = Table()
        for name, folds in zip(names, prose, strict=True):
            table.add_column(name, no_wrap=not folds, overflow="fold")
        for row in cells:
            table.add_row(*row)
        console.print(table)
    else:
        longest = max(cell_len(name.plain) for name in names)
        for number, row in enumerate(cells, start=1):
            console.print(Text(f"── {number} ──", "dim"))
            for name, value in zip(names, row, strict=True):
                padding = " " * (longest - cell_len(name.plain) + 2)
                # Folded by the terminal, which gives an id back whole when it is copied.
                console.print(Text.assemble((name.plain, "bold"), padding, value), soft_wrap=True)
    return any(value is not None and len(printable(value)) > SHOWN for row in rows for value in row)
