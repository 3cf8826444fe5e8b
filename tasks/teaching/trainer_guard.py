"""Run a command, and end it with all that it started as soon as the process that asked for it is gone.

It is a script, started by its path in a session of its own, with the standard library alone: a training must not go on
unseen when the worker that asked for it was killed. Standard input is a pipe that the worker holds open and never
writes to; its end is the wish to stop. The exit status is the command's; of a command that a signal ended it is 128
more than the signal's number, as in a shell, and 127 where the command cannot be started.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

LOOK_SECONDS = 0.05  # between two looks whether the command has ended; the end of the pipe is seen at once
GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL


def main(words: list[str]) -> int:
    """Run the command to its end, or to the pipe's."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # its own, which goes to the whole group; the command gets its usual
    try:
        command = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{words[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 127
    while command.poll() is None:
        if select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
            _end(command)
    return command.returncode if command.returncode >= 0 else 128 - command.returncode


def _end(command: subprocess.Popen[bytes]) -> None:
    """End the whole process group, this process last."""
    os.killpg(0, signal.SIGTERM)
    try:
        command.wait(GRACE_SECONDS)
    finally:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
