"""One progress bar per stage, with an ETA, on whatever the process's standard error is."""

from __future__ import annotations

import functools
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

from tasks import logs

console = Console(stderr=True)
_PLAIN_INTERVAL = 15.0  # seconds between lines where the output is no terminal
_lock = threading.Lock()
_display: Progress | None = None  # rich draws one at a time: stages that are under way at the same time share it
_under_way = 0


@contextmanager
def stage(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show `name` while the block runs; call the yielded function with the number of items just finished.

    Nothing is shown where `total` is 0: all was there already.
    """
    if not total:
        yield lambda count: None
        return
    if not console.is_terminal:
        yield _plain(name, total)
        return
    progress = _begin()
    try:
        bar = progress.add_task(name, total=total)
        yield lambda count: progress.advance(bar, count)
    finally:
        _end()


def _begin() -> Progress:
    """Return the display, which is started with the first stage under way."""
    global _display, _under_way  # noqa: PLW0603  # one a process
    with _lock:
        if _display is None:
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
            _display = Progress(*columns, console=console)
            _display.start()
            logs.write = functools.partial(console.out, highlight=False)
        _under_way += 1
        return _display


def _end() -> None:
    """Take the display away after the last stage that is under way; what it shows stays on the terminal."""
    global _display, _under_way  # noqa: PLW0603
    with _lock:
        _under_way -= 1
        if not _under_way and _display is not None:
            logs.write = logs.print_line
            _display.stop()
            _display = None


def _plain(name: str, total: int) -> Callable[[int], None]:
    done, started, printed = 0, time.monotonic(), time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        now = time.monotonic()
        if done >= total or (done and now - printed >= _PLAIN_INTERVAL):
            printed = now
            left = (now - started) / done * (total - done)
            line = f"{name}: {done:.0f}/{total}, {now - started:.0f} s elapsed, {left:.0f} s left"
            console.out(logs.as_line(line), highlight=False)

    return advance
