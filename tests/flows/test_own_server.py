"""The temporary Prefect server of a command."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
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


def test_a_flow_is_begun_again_where_the_server_went_away_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(own_server, "wait_for_server", lambda: asked.append("server"))

    def flow(failures: list[str], *, answer: int) -> int:
        asked.append("flow")
        if failures:
            raise RuntimeError(failures.pop(0))
        return answer

    gone = "Failed to reach API at http://127.0.0.1:1/api/"
    assert own_server.run_flow(flow, [gone], answer=3) == 3
    assert asked == ["server", "flow"] * 2
    for failures, said in (([gone, gone], "Failed to reach"), (["something else"], "something else")):
        with pytest.raises(RuntimeError, match=said):
            own_server.run_flow(flow, failures, answer=3)


def test_prefect_says_so_before_the_first_line_of_a_flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own, as Prefect asks once a process."""
    program = (
        "from prefect import flow\nfrom flows.commands import own_server\n"
        "own_server.wait_for_server = lambda: print('waited')\n"
        "own_server.run_flow(flow(lambda: print('begun'), name='any'))"
    )
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}/api")
        monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["waited", "waited"], done.stderr
    assert own_server._GONE in done.stderr
