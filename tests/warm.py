"""The `fastgda` command without its imports: each command runs in a fork of a process that has them behind it.

A command of a test takes seconds to import torch, diffusers and Prefect, and often little else; the rest is the real
thing: arguments, environment, folder, input and both outputs, exit code. Tests about processes start `fastgda` itself.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

_HEADER = 8
# What a shell runs as `fastgda`; without site-packages it starts in 30 ms.
_CLIENT = """#!{python} -IS
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
order = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(link, [len(order).to_bytes(8, "big")], [0, 1, 2])
link.sendall(order)
sys.exit(int.from_bytes(link.recv(8), "big", signed=True))
"""


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(["fastgda", *arguments], env=environment, capture_output=True, text=True)`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, socket.socket(socket.AF_UNIX) as link:
        link.connect(_address())
        order = json.dumps([list(arguments), dict(environment), str(Path.cwd())]).encode()
        fds = [sys.__stdin__.fileno() if sys.__stdin__ else 0, out.fileno(), err.fileno()]
        socket.send_fds(link, [len(order).to_bytes(_HEADER, "big")], fds)
        link.sendall(order)
        code = int.from_bytes(_received(link, _HEADER), "big", signed=True)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(["fastgda", *arguments], code, *texts)


def write_command(folder: Path) -> None:
    """Put a `fastgda` into a folder for shells to find, which does the same."""
    command = folder / "fastgda"
    command.write_text(_CLIENT.format(python=sys.executable, address=_address()))
    command.chmod(0o755)


@functools.cache
def _address() -> str:
    """Socket of the process that forks, one for each process of tests; it ends when that one does."""
    address = tempfile.mkdtemp(prefix="warm-") + "/socket"
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "tests.warm", address, str(ours)]
    subprocess.Popen(command, cwd=Path(__file__).parents[1], pass_fds=[ours], stdin=subprocess.DEVNULL)
    os.close(ours)
    os.set_inheritable(theirs, False)
    while not Path(address).exists():
        time.sleep(0.05)
    return address


def _received(link: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = link.recv(size - len(found))
        if not more:
            raise EOFError
        found += more
    return found


def _serve(address: str, alive: int) -> None:
    # The first says how little Prefect logs.
    for name in (
        "flows.commands.main",
        "flows.pipeline",
        "flows.study",
        "lightning",
        "kronfluence",
        "diffusers.models.unets",
    ):
        importlib.import_module(name)
    for name in ("CLIPTextModel", "CLIPTokenizer", "BertModel", "BertTokenizerFast"):
        getattr(importlib.import_module("transformers"), name)

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}-")
    listening.listen(64)
    Path(f"{address}-").rename(address)
    if os.fork() == 0:  # ends the whole with whoever started it, whose end of the pipe closes then
        os.read(alive, 1)
        os.killpg(0, 9)
    os.close(alive)
    while True:
        link, _ = listening.accept()
        if os.fork() == 0:
            if os.fork() == 0:
                listening.close()
                _answer(link)
            os._exit(0)
        os.wait()
        link.close()


def _answer(link: socket.socket) -> None:
    """Run the command that is asked for in a child, and tell its exit code."""
    header, fds, _, _ = socket.recv_fds(link, _HEADER, 3)
    arguments, environment, folder = json.loads(_received(link, int.from_bytes(header, "big")))
    pid = os.fork()
    if pid == 0:
        link.close()
        _become(arguments, environment, folder, fds)
    _, status = os.waitpid(pid, 0)
    link.sendall(os.waitstatus_to_exitcode(status).to_bytes(_HEADER, "big", signed=True))
    os._exit(0)


def _become(arguments: list[str], environment: dict[str, str], folder: str, fds: list[int]) -> None:
    """The command, from here to the end of this process."""
    from prefect.context import refresh_global_settings_context

    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["fastgda", *arguments]
    code = 1
    try:
        refresh_global_settings_context()
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))  # it has read another environment
        sys.modules["flows.commands.main"].main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # `main` registers one that ends the process
    os._exit(code)


if __name__ == "__main__":
    os.setsid()
    _serve(sys.argv[1], int(sys.argv[2]))
