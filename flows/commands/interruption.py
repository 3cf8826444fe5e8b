"""Ctrl-C and SIGTERM: the command ends soon, says in one line how to go on, and what is finished is kept.

Before anything is begun the process ends there and then. Later the main thread is left by a `KeyboardInterrupt`, which
ends flow runs, and other threads and worker processes stop at their next checkpoint. Whatever does not end in time,
or at a second Ctrl-C, is left as it stands: files are whole or absent at any instant.

During a flow run Prefect answers SIGTERM in our place, by an error in the main thread, and hands it on when that has
come through. Where something swallows the error, or makes another one of it, nothing is handed on. So a thread sees
each SIGTERM, too, whoever answers it, and interrupts the main thread itself where that goes on.
"""

from __future__ import annotations

import _thread
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from fastgda_core.interruption import stop_here

GRACE_SECONDS = 30.0
ANSWER_SECONDS = 5.0  # in which Prefect has to hand a SIGTERM on
SAME_PRESS_SECONDS = 0.5  # `timeout` and some shells send a signal to the process and to its group


@dataclass
class _Command:
    """The state of this process's command.

    signal: number of the signal that came; at: when it came.
    terminated: a SIGTERM came, whoever answers it; watched: a thread looks for one.
    begun: there is something to leave in good order.
    goes_on: the same command goes on where this one stopped.
    said: the line that says how to go on was printed.
    at_end: called at an end without a warning.
    """

    signal: int | None = None
    at: float = 0.0
    terminated: bool = False
    watched: bool = False
    begun: bool = False
    goes_on: bool = False
    said: bool = False
    at_end: list[Callable[[], None]] = field(default_factory=list)


_command = _Command()


def watch(*, begun: bool) -> None:
    """Answer Ctrl-C and SIGTERM from here on.

    Args:
        begun: there is, or may soon be, something to leave in good order.
    """
    _command.begun = begun
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def starting(at_end: Callable[[], None]) -> None:
    """Note that a command that goes on where it stopped is about to begin.

    `at_end` is called at an end without a warning.
    """
    _command.begun, _command.goes_on = False, True
    _command.at_end.append(at_end)


def under_way() -> None:
    """Note that from here on there is something to leave in good order."""
    _command.begun = True
    if _command.watched:
        return
    _command.watched = True
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_see_terminations, args=(read,), daemon=True).start()


def _see_terminations(pipe: int) -> None:
    """End in time after the first SIGTERM, at once after another one; `pipe` brings the numbers of all signals."""
    first = 0.0
    while True:
        if signal.SIGTERM not in os.read(pipe, 1):
            continue
        now = time.monotonic()
        if _command.terminated and now - first > SAME_PRESS_SECONDS and _command.signal is None:
            _end()
        if not _command.terminated:
            _command.terminated, first = True, now
            logging.disable()  # errors of work that is interrupted are not reported
            threading.Thread(target=_terminate_in_time, daemon=True).start()


def _terminate_in_time() -> None:
    time.sleep(ANSWER_SECONDS)
    if _command.signal is None:
        _thread.interrupt_main()
    _end_in_time()


def exit_code() -> int | None:
    """Return the exit code of an interrupted command; None where no signal came."""
    number = signal.SIGTERM if _command.signal is None and _command.terminated else _command.signal
    return None if number is None else 128 + number


def say_how_to_go_on() -> None:
    """Print one line on how to go on, to standard error, once."""
    if _command.said or multiprocessing.parent_process() is not None:  # the command itself says it
        return
    _command.said = True
    word = "interrupted" if _command.signal == signal.SIGINT else "terminated"
    again = shlex.join(["fastgda", *sys.argv[1:]])
    line = f"{word}; `{again}` goes on where it stopped" if _command.goes_on else word
    # By the file's number: the signal may have come in the middle of a print, or of a display that hid the cursor.
    os.write(2, ("\x1b[?25h" if os.isatty(2) else "").encode() + line.encode(errors="replace") + b"\n")


def _interrupt(number: int, _frame: FrameType | None) -> None:
    now = time.monotonic()
    if _command.signal is not None:
        if now - _command.at > SAME_PRESS_SECONDS:
            _end()
        return
    _command.signal, _command.at = signal.SIGTERM if _command.terminated else number, now
    if not _command.begun:
        _end()
    # Errors of work that is interrupted are not reported.
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
    for step in _command.at_end:
        step()
    os._exit(exit_code() or 1)
