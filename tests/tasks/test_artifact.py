"""What is made once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from storage_schemas.commit import Manifest, commit
from storage_schemas.runs import lease
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, once

KEY = "k" * 16


def maker(path: Path, calls: list[float], content: bytes = b"x", rows: int = 3, seconds: float = 0.0):
    def make(started: float) -> Manifest:
        calls.append(started)
        time.sleep(seconds)
        return commit(path, lambda temporary: temporary.write_bytes(content), key=KEY, rows=rows, started=started - 5)

    return make


def test_a_file_is_made_where_it_is_not_there_and_reused_where_it_is(tmp_path: Path) -> None:
    path, calls = tmp_path / "a", list[float]()
    artifact = Artifact("thing", KEY, path, 0)
    first, again = (once(artifact, path, maker(path, calls)) for _ in range(2))
    assert (first.reused, again.reused, len(calls)) == (False, True, 1)
    assert first.artifact == again.artifact == Artifact("thing", KEY, path, 3), "its rows are those committed"
    assert first.seconds == again.seconds == pytest.approx(5, abs=1)
    path.write_bytes(b"longer")
    assert not once(artifact, path, maker(path, calls)).reused, "it is not what was committed"
    assert not once(Artifact("thing", "other", path, 0), path, maker(path, calls)).reused, "it is of other inputs"
    assert len(calls) == 3


def test_it_is_made_again_without_what_belongs_beside_it(tmp_path: Path) -> None:
    path, beside, calls = tmp_path / "a", tmp_path / "b", list[float]()
    artifact = Artifact("thing", KEY, path, 0)

    def make(started: float) -> Manifest:
        commit(beside, lambda temporary: temporary.write_bytes(b"y"), key=KEY, rows=1, started=started)
        return maker(path, calls)(started)

    once(artifact, path, make, beside=[beside])
    assert once(artifact, path, make, beside=[beside]).reused
    beside.unlink()
    assert not once(artifact, path, make, beside=[beside]).reused
    assert beside.read_bytes() == b"y" and len(calls) == 2


def test_of_several_that_want_it_one_makes_it_while_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    path, calls, made = tmp_path / "a", list[float](), []
    artifact, workspace = Artifact("thing", KEY, path, 0), Workspace(tmp_path)

    def want() -> None:
        made.append(once(artifact, path, maker(path, calls, seconds=0.2), alone_in=workspace))

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and sorted(each.reused for each in made) == [False, True, True]
    assert f"thing {KEY}: " in capsys.readouterr().err
    assert not list(workspace.lease(KEY).glob("*.json")), "what it took to agree is gone"
