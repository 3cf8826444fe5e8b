"""The process, or processes, that listen."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from storage_schemas.snapshots.published import read_published
from storage_schemas.workspace import Workspace
from tasks.serving.http.keys import read_keys
from tasks.serving.http.metrics import SHARED
from tasks.serving.http.problems import one_line
from tasks.serving.http.settings import ServiceSettings

APP = "tasks.serving.http.app:from_environment"
DRAIN_SECONDS = 30  # requests that are being answered may take so long when the service is told to end
KEEP_ALIVE_SECONDS = 15
BACKLOG = 1024


def check(settings: ServiceSettings) -> str:
    """Return what is missing until questions can be answered; empty where nothing is.

    Raises:
        StoreError: the file of keys cannot be read.
    """
    if settings.keys is not None:
        read_keys(Path(settings.keys))
    try:
        published = read_published(Workspace.at(settings.workspace))
    except StoreError as error:
        return one_line(error)
    return "" if published.index else f"{settings.workspace} has scores but no index yet: let the run finish"


def bind(settings: ServiceSettings) -> socket.socket:
    """Return a socket that listens where the settings say.

    Raises:
        UsageError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY: else each response to a connection that is kept waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise UsageError(
            f"{settings.host}:{settings.port}: {error.strerror}: choose another --port or --host"
        ) from None
    listening.set_inheritable(True)
    return listening


def run(settings: ServiceSettings, listening: socket.socket) -> None:
    """Serve until a signal ends it, then answer what is under way."""
    # uvicorn hands the signal that ended it to whoever handled it before. It is done by then: nothing is left to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="fastgda-serve-") as runtime:
        settings.model_copy(update={"runtime": runtime}).stored()
        if settings.workers > 1:
            os.environ[SHARED] = runtime
        config = uvicorn.Config(
            APP,
            factory=True,
            workers=settings.workers,
            access_log=False,
            log_level="warning",
            server_header=False,
            date_header=True,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            backlog=BACKLOG,
            lifespan="on",
            ws="none",
        )
        if settings.workers > 1:  # uvicorn spawns them: models and OpenMP begin in each
            Multiprocess(config, sockets=[listening]).run()
        else:
            uvicorn.Server(config).run(sockets=[listening])
