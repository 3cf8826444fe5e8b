"""A Python in which the teacher `letters` is known: `python -m tests.tasks.execution.letter_task -m MODULE ARGUMENTS`.

What goes wrong is said by the environment: SLOW, seconds that a part takes; DEADLY, a folder: as long as there is a
file of a letter's number in it, a process that begins the letter deletes the file and is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fastgda_core.interruption import checkpoint
from tasks.execution import array_task, taken_parts
from tests.tasks.letters import taught_by_letters

if __name__ == "__main__":
    assert sys.argv[1:3] == ["-m", "tasks.execution.array_task"]
    with pytest.MonkeyPatch.context() as patch:
        family = taught_by_letters(patch)
        taken_parts.LOOK_SECONDS = 0.2
        slow, deadly = float(os.environ.get("SLOW", "0")), Path(os.environ.get("DEADLY", "/nowhere"))
        known = family.begin

        def begin(kind: str, number: int) -> None:
            known(kind, number)
            if kind == "letters" and (deadly / str(number)).exists():
                (deadly / str(number)).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            until = time.monotonic() + slow
            while time.monotonic() < until:
                checkpoint()
                time.sleep(0.02)

        family.begin = begin  # type: ignore[method-assign]
        sys.exit(array_task.main(*sys.argv[3:]))
