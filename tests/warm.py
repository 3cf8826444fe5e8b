"""The `fastgda` command without its imports: each command runs in a fork of a process that has them behind it.

A command of a test takes seconds to import torch, diffusers and Prefect, and often little else; the rest is the real
thing: arguments, environment, folder, both outputs, exit code. Tests about processes start `fastgda` itself.
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
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

_HEADER = 8


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(["fastgda", *arguments], env=environment, capture_output=True, text=True)`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        link = _zygote()
        order = json.dumps([list(arguments), dict(environment), str(Path.cwd())]).encode()
        link.sendall(len(order).to_bytes(_HEADER, "big") + order)
        socket.send_fds(link, [b"x"], [out.fileno(), err.fileno()])
        code = int.from_bytes(_received(link, _HEADER), "big", signed=True)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(["fastgda", *arguments], code, *texts)


@functools.cache
def _zygote() -> socket.socket:
    """The process that forks, one for each process of tests; it ends with its end of the socket."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    subprocess.Popen(command, cwd=Path(__file__).parents[1], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


def _received(link: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = link.recv(size - len(found))
        if not more:
            raise EOFError
        found += more
    return found


def _serve(link: socket.socket) -> None:
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

    while True:
        try:
            arguments, environment, folder = json.loads(
                _received(link, int.from_bytes(_received(link, _HEADER), "big"))
            )
        except EOFError:
            return
        _, outputs, _, _ = socket.recv_fds(link, 1, 2)
        pid = os.fork()
        if pid == 0:
            link.close()
            _become(arguments, environment, folder, outputs)
        for output in outputs:
            os.close(output)
        _, status = os.waitpid(pid, 0)
        link.sendall(os.waitstatus_to_exitcode(status).to_bytes(_HEADER, "big", signed=True))


def _become(arguments: list[str], environment: dict[str, str], folder: str, outputs: list[int]) -> None:
    """The command, from here to the end of this process."""
    from prefect.context import refresh_global_settings_context

    for output, number in zip(outputs, (1, 2), strict=True):
        os.dup2(output, number)
        os.close(output)
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
    _serve(socket.socket(fileno=int(sys.argv[1])))
