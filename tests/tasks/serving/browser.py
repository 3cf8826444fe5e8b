"""A real headless Chromium and a real service on loopback, for tests of the page."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, sync_playwright

from tasks import logs
from tasks.serving.http.app import create_app
from tasks.serving.http.settings import ServiceSettings

WAIT = 60.0


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser; without it a test is skipped, or fails where it is asked for."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("FASTGDA_REQUIRE_CHROMIUM"):
            pytest.fail("Chromium is not installed, and FASTGDA_REQUIRE_CHROMIUM asks for it")
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def service(settings: ServiceSettings) -> Iterator[str]:
    """The service in a thread of this process; gives its URL when it can answer."""
    logging.getLogger(logs.ROOT).setLevel(logging.WARNING)  # no line for each request
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + WAIT
        while not _ready(url):
            assert time.monotonic() < until, "the service is not ready"
            time.sleep(0.1)
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=WAIT)
        listening.close()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False
