"""A Prefect server of this command's own, where no other is configured: on loopback, gone with the command.

Prefect starts such a server by itself when a flow first needs one. Started here it comes up while this process still
imports, the process need not load the server's code, and the server ends even where this process is killed.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from fastgda_core.errors import UsageError

STARTUP_SECONDS = 120.0
RESTART_SECONDS = 60.0  # a configured server may be on its way up again
_SERVER = """
import ctypes, os, runpy, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, on Linux
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):  # it was killed before this process could ask to be told
    sys.exit()
sys.argv = ["uvicorn", *sys.argv[2:]]
runpy.run_module("uvicorn", run_name="__main__")
"""
# Nobody waits for its events or its schedules, and it shows no page.
_SETTINGS = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_UI_ENABLED": "0",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
}
_server: subprocess.Popen[bytes] | None = None


def start_server() -> None:
    """Begin to start a server, unless one is configured; `wait_for_server` before the first flow."""
    global _server  # noqa: PLW0603  # one a process
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    if _server is not None or PREFECT_API_URL.value():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ("--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port))
    _server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(os.getpid()), *arguments, "--log-level", "error", "--lifespan", "on"],
        env={**os.environ, **_SETTINGS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(_stop, _server)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    refresh_global_settings_context()


def wait_for_server() -> None:
    """Until the Prefect server answers: the one that `start_server` began to start, or the one that is configured.

    Raises:
        UsageError: it does not.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    deadline = time.monotonic() + (STARTUP_SECONDS if _server else RESTART_SECONDS)
    while not _answers(f"{url}/health"):
        if _server is not None and _server.poll() is not None:
            raise UsageError(f"the temporary Prefect server ended ({_server.poll()}): `prefect server start` says why")
        if time.monotonic() > deadline:
            raise UsageError(f"no Prefect server answers at {url}: start it, or unset PREFECT_API_URL to do without")
        time.sleep(0.05 if _server else 0.5)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # whether it lets us in, the flow will see
    except OSError:
        return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
