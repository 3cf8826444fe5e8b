"""Ctrl-C and SIGTERM: the command ends soon, says in one line how to go on, and what is finished is kept.

Before anything is begun the process ends there and then. Later the main thread is left by a `KeyboardInterrupt`, which
ends flow runs, and other threads and worker processes stop at their next checkpoint. Whatever does not end in time,
or at a second Ctrl-C, is left as it stands: files are whole or absent at any instant.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from fastgda_core.interruption import stop_here

GRACE_SECONDS = 30.0
SAME_PRESS_SECONDS = 0.5  # `timeout` and some shells send a signal to the process and to its group
_cause: int | None = None  # number of the signal that came
_at = 0.0
_begun = False  # there is something to leave in good order
_goes_on = False
_said = False
_last: list[Callable[[], None]] = []


def watch(*, begun: bool) -> None:
    """Answer Ctrl-C and SIGTERM from here on.

    Args:
        begun: there is, or may soon be, something to leave in good order.
    """
    global _begun  # noqa: PLW0603
    _begun = begun
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def starting(last: Callable[[], None]) -> None:
    """A command whose work goes on where it stopped is about to begin; `last` is called at an end without a warning."""
    global _begun, _goes_on
    _begun, _goes_on = False, True
    _last.append(last)


def under_way() -> None:
    """From here on there is something to leave in good order."""
    global _begun  # noqa: PLW0603
    _begun = True


def exit_code() -> int | None:
    """That of an interrupted command; None where no signal came."""
    return None if _cause is None else 128 + _cause


def say_how_to_go_on() -> None:
    """The one line, in standard error, once."""
    global _said  # noqa: PLW0603
    if _said:
        return
    _said = True
    command = shlex.join(["fastgda", *sys.argv[1:]])
    word = "interrupted" if _cause == signal.SIGINT else "terminated"
    line = f"{word}; `{command}` goes on where it stopped" if _goes_on else word
    # By the file's number: the signal may have come in the middle of a print.
    os.write(2, ("\x1b[?25h" if os.isatty(2) else "").encode() + line.encode(errors="replace") + b"\n")


def _interrupt(number: int, _frame: FrameType | None) -> None:
    global _cause, _at
    now = time.monotonic()
    if _cause is not None:
        if now - _at > SAME_PRESS_SECONDS:
            _end()
        return
    _cause, _at = number, now
    if not _begun:
        _end()
    # What falls over while it is left is no news.
    logging.disable()
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    stop_here()
    for child in multiprocessing.active_children():
        if child.pid:
            os.kill(child.pid, signal.SIGINT)
    threading.Thread(target=_end_in_time, daemon=True).start()
    raise KeyboardInterrupt


def _end_in_time() -> None:
    time.sleep(GRACE_SECONDS)
    _end()


def _end() -> None:
    """End this process and those that it started, whatever they are at."""
    say_how_to_go_on()
    for child in multiprocessing.active_children():
        child.kill()
    for last in _last:
        last()
    os._exit(exit_code() or 1)
