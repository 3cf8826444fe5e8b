"""Output of the commands."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from tasks.printable import printable


def warn(text: str) -> None:
    out.print(f"[bold yellow]warning:[/] {escape(printable(text))}", highlight=False, soft_wrap=True)


out = Console()


def say(text: str) -> None:
    out.print(printable(text, lines=True), highlight=False, soft_wrap=True, markup=False)
