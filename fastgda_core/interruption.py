"""How long work is told to stop: it asks between two micro-batches."""

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
    return _stop.is_set()


def stop_on_interrupt() -> None:
    """Make Ctrl-C end this process's work at its next checkpoint, and no more: its parent ends the process."""
    signal.signal(signal.SIGINT, lambda *_: stop_here())


@contextmanager
def checked_by(check: Callable[[], None]) -> Iterator[None]:
    """Work in the block calls `check` between two micro-batches; what it raises ends the work."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def checkpoint() -> None:
    """A place where the work may be stopped and nothing is half done.

    Raises:
        Stopped: by `stop_here`, or by whoever checks this work.
    """
    if stopping():
        raise Stopped
    check = _check.get()
    if check is not None:
        check()
