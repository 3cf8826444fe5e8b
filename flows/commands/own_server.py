"""A Prefect server of this command's own, where no other is configured: on loopback, gone with the command.

Prefect starts such a server by itself when a flow first needs one. Started here it comes up while this process still
imports, the process need not load the server's code, and on Linux the server ends even where this process is killed.

The server is in a session of its own: Ctrl-C, which a terminal sends to all processes of a command, does not end it,
and the command can still tell it how the flow runs ended. Its database is a temporary one, apart from the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from fastgda_core.errors import UsageError
from flows.commands import interruption

P = ParamSpec("P")
T = TypeVar("T")

STARTUP_SECONDS = 300.0  # the first one makes its tables
RESTART_SECONDS = 60.0  # a configured server may be on its way up again
_END = signal.SIGHUP  # uvicorn has no answer of its own to it, so that the server is gone at once
_SERVER = """
import ctypes, os, runpy, shutil, signal, sys
parent, folder = int(sys.argv[1]), sys.argv[2]
def end(*_):
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
signal.signal(signal.SIGHUP, end)
try:
    ctypes.CDLL(None).prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG, on Linux
except (OSError, AttributeError):
    pass
if os.getppid() != parent:  # it was killed before this process could ask to be told
    end()
sys.argv = ["uvicorn", *sys.argv[3:]]
runpy.run_module("uvicorn", run_name="__main__")
"""
# No other program uses this server: it needs no event services and no web page.
SETTINGS = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_UI_ENABLED": "0",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
}
# Prefect's first words where it finds no server; it asks once a process, before the first flow begins.
_GONE = "Failed to reach API"
SHOWN_LINES = 5  # of what a server that failed wrote


@dataclass(frozen=True)
class _Server:
    process: subprocess.Popen[bytes]
    folder: Path
    errors: IO[bytes]

    @property
    def database(self) -> Path:
        return self.folder / "prefect.db"

    def stop(self) -> None:
        """End the server at once: its database is not needed any more."""
        self.process.send_signal(_END)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def last_words(self) -> str:
        self.errors.seek(0)
        return "\n".join(self.errors.read().decode(errors="replace").splitlines()[-SHOWN_LINES:])


_server: _Server | None = None


def start_server() -> None:
    """Begin to start a server, unless one is configured; call `run_flow` for the first flow."""
    global _server  # noqa: PLW0603  # one a process
    interruption.starting(stop_server)
    from prefect.context import refresh_global_settings_context

    if _server is not None or server_is_configured():
        return
    folder = Path(tempfile.mkdtemp(prefix="fastgda-prefect-"))
    errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server
    with socket.socket() as listener:  # handed over open, so that nobody else can take the port meanwhile
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        arguments = ("--factory", "prefect.server.api.server:create_app", "--fd", str(listener.fileno()))
        options = ("--log-level", "error", "--lifespan", "on")
        _server = _Server(
            subprocess.Popen(
                [sys.executable, "-c", _SERVER, str(os.getpid()), str(folder), *arguments, *options],
                env={**os.environ, **SETTINGS, "PREFECT_SERVER_DATABASE_CONNECTION_URL": _new_database(folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            ),
            folder,
            errors,
        )
    atexit.register(stop_server)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"  # it shows no page
    refresh_global_settings_context()


def server_is_configured() -> bool:
    """Return whether flows go to a server that is there already."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def stop_server() -> None:
    """End the server of this process, if it has one."""
    if _server is not None:
        _server.stop()


def run_flow(flow: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Run a flow once the Prefect server answers; once more where the server went away before the flow began.

    Raises:
        UsageError: no server answers in time.
    """
    wait_for_server()
    try:
        return flow(*arguments, **options)
    except RuntimeError as error:
        if not str(error).startswith(_GONE):
            raise
    wait_for_server()
    return flow(*arguments, **options)


def wait_for_server() -> None:
    """Wait for the Prefect server to answer: the one that `start_server` began to start, or the configured one.

    Raises:
        UsageError: no server answers in time.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    deadline = time.monotonic() + (STARTUP_SECONDS if _server else RESTART_SECONDS)
    while not _answers(f"{url}/health"):
        if _server is not None and _server.process.poll() is not None:
            raise UsageError(
                f"the temporary Prefect server ended with {_server.process.returncode}:\n{_server.last_words()}"
            )
        if time.monotonic() > deadline:
            raise UsageError(f"no Prefect server answers at {url}: start it, or unset PREFECT_API_URL to do without")
        time.sleep(0.05 if _server else 0.5)
    if _server is not None:
        _keep_empty(_server.database)
    interruption.under_way()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # whether it lets us in, the flow will see
    except OSError:
        return False


def _new_database(folder: Path) -> str:
    """Return the URL of a new database in this folder: without rows, but with tables that an earlier server made."""
    with contextlib.suppress(OSError):  # the first server of this release makes them: it takes seconds
        shutil.copyfile(_empty_database(), folder / "prefect.db")
    return f"sqlite+aiosqlite:///{folder / 'prefect.db'}"


def _keep_empty(database: Path) -> None:
    """Keep a copy of a new server's database for the servers of later commands."""
    kept = _empty_database()
    if kept.exists():
        return
    temporary = kept.with_name(f".{os.getpid()}-{kept.name}")
    with contextlib.suppress(OSError, sqlite3.Error):
        with (
            contextlib.closing(sqlite3.connect(database)) as original,
            contextlib.closing(sqlite3.connect(temporary)) as copy,
        ):
            original.backup(copy)
        temporary.replace(kept)


def _empty_database() -> Path:
    from prefect import __version__
    from prefect.settings import PREFECT_HOME

    return Path(PREFECT_HOME.value()) / f"fastgda-empty-{__version__}.db"
