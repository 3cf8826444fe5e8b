"""One progress bar per stage, with an ETA, on whatever the process's standard error is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)
_PLAIN_INTERVAL = 15.0  # seconds between lines where the output is no terminal
_showing = threading.Lock()  # rich draws one live display at a time


@contextmanager
def stage(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show `name` while the block runs; call the yielded function with the number of items just finished.

    Nothing is shown where `total` is 0: all was there already.
    """
    if not total:
        yield lambda count: None
        return
    with _showing:
        if console.is_terminal:
            columns = (
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description:<34}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("[dim]elapsed"),
                TimeElapsedColumn(),
                TextColumn("[dim]left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task(name, total=total)
                yield lambda count: progress.advance(bar, count)
        else:
            yield _plain(name, total)


def _plain(name: str, total: int) -> Callable[[int], None]:
    done, started, printed = 0, time.monotonic(), time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        now = time.monotonic()
        if done >= total or now - printed >= _PLAIN_INTERVAL:
            printed = now
            left = (now - started) / done * (total - done)
            line = f"{name}: {done:.0f}/{total}, {now - started:.0f} s elapsed, {left:.0f} s left"
            console.print(line, highlight=False)

    return advance
