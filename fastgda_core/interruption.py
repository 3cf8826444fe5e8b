"""Stopping of long work: the work asks between two micro-batches whether it has to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastgda_core.errors import Stopped

_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)
_stop = threading.Event()


def stop_here() -> None:
    """Make all work of this process, in whatever thread, end at its next checkpoint, for good."""
    _stop.set()


def stopping() -> bool:
    """Return whether `stop_here` was called."""
    return _stop.is_set()


def stop_on_interrupt() -> None:
    """Make Ctrl-C end this process's work at its next checkpoint, and no more: its parent ends the process."""
    signal.signal(signal.SIGINT, lambda *_: stop_here())


@contextmanager
def checked_by(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` between two micro-batches of the work in the block; an exception of `check` ends the work."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def checkpoint() -> None:
    """End the work here if it has to stop; called where nothing is half done.

    Raises:
        Stopped: by `stop_here`, or by the check of `checked_by`.
    """
    if stopping():
        raise Stopped
    check = _check.get()
    if check is not None:
        check()
