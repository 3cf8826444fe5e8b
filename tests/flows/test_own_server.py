"""The temporary Prefect server of a command."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.context import refresh_global_settings_context

from fastgda_core.errors import UsageError
from flows.commands import own_server


@pytest.fixture
def none_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with monkeypatch.context() as here:
        here.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
        here.setenv("PREFECT_API_URL", "")
        here.setenv("PREFECT_LOGGING_TO_API_ENABLED", "true")
        here.setenv("TMPDIR", str(tmp_path))
        here.setattr("tempfile.tempdir", None)
        here.setattr(own_server, "_server", None)
        refresh_global_settings_context()
        yield
    refresh_global_settings_context()


@pytest.mark.usefixtures("none_configured")
def test_a_server_that_fails_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(own_server, "_SERVER", "import sys; sys.exit('there is no room')")
    own_server.start_server()
    with pytest.raises(UsageError, match="ended with 1:\nthere is no room"):
        own_server.wait_for_server()
    own_server.stop_server()
    assert not list(tmp_path.glob("fastgda-prefect-*"))


@pytest.mark.usefixtures("none_configured")
def test_a_new_database_has_the_tables_of_the_one_before_and_no_row(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
    assert own_server._new_database(first) == f"sqlite+aiosqlite:///{first}/prefect.db"
    with sqlite3.connect(first / "prefect.db") as database:
        database.execute("CREATE TABLE flow_run (id)")
    own_server._keep_empty(first / "prefect.db")
    with sqlite3.connect(first / "prefect.db") as database:
        database.execute("INSERT INTO flow_run VALUES (1)")
    own_server._new_database(second)
    with sqlite3.connect(second / "prefect.db") as database:
        assert database.execute("SELECT * FROM flow_run").fetchall() == []
