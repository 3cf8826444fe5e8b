"""A service over a whole run, in this process: requests pass everything but a socket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # see tests/conftest.py
    from starlette.testclient import TestClient

    from tasks.serving.http.settings import ServiceSettings
    from tests.tasks.whole_runs import WholeRun

HOST = "http://127.0.0.1"


def settings_of(run: WholeRun, **changes: object) -> ServiceSettings:
    from tasks.serving.http.settings import ServiceSettings

    known = {"workspace": str(run.workspace.root), "hosts": ["127.0.0.1", "localhost"], "poll_seconds": 0.05}
    return ServiceSettings.model_validate(known | changes)


@contextmanager
def serving(settings: ServiceSettings) -> Iterator[TestClient]:
    """A client of a service that is ready."""
    from starlette.testclient import TestClient

    from tasks.serving.http.app import create_app

    with TestClient(create_app(settings), base_url=HOST, raise_server_exceptions=False) as client:
        until = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < until, client.get("/readyz").text
            time.sleep(0.02)
        yield client


@pytest.fixture(scope="session")
def client(similar: WholeRun) -> Iterator[TestClient]:
    """A service without keys."""
    with serving(settings_of(similar)) as client:
        yield client


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"
