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
import urllib.request

STARTUP_SECONDS = 120.0
_SERVER = """
import ctypes, runpy, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, on Linux
except (OSError, AttributeError):
    pass
sys.argv = ["uvicorn", *sys.argv[1:]]
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
        [sys.executable, "-c", _SERVER, *arguments, "--log-level", "error", "--lifespan", "on"],
        env={**os.environ, **_SETTINGS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(_stop, _server)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    refresh_global_settings_context()


def wait_for_server() -> None:
    """Until the server that `start_server` began to start answers.

    Raises:
        RuntimeError: it does not.
    """
    if _server is None:
        return
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{os.environ['PREFECT_API_URL']}/health", timeout=5):
                return
        except OSError:
            if _server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the temporary Prefect server did not come up (exit code {_server.poll()}): "
                    "`prefect server start` says why"
                ) from None
            time.sleep(0.05)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
