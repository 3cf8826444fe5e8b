"""Real processes that want the same thing at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage_schemas.files import create
from storage_schemas.runs import lease
from storage_schemas.runs.lease import Lease, sole_maker
from storage_schemas.workspace import Workspace

MAKER = """
import sys, time
from storage_schemas.runs.lease import sole_maker
from storage_schemas.workspace import Workspace
workspace = Workspace.at(sys.argv[1])
made = workspace.file("made")
with sole_maker(workspace, "k", made.exists, lambda owner: print("waiting", flush=True)):
    if not made.exists():
        print("making", flush=True)
        time.sleep(float(sys.argv[2]))
        made.write_text("made")
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKER, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("leases/k/*"))


@pytest.mark.integration
def test_of_several_processes_one_makes_it_and_when_it_is_killed_exactly_one_follows(tmp_path: Path) -> None:
    makers = [start(tmp_path, 600)]
    assert makers[0].stdout is not None and makers[0].stdout.readline() == "making\n"
    makers += [start(tmp_path, 1.5) for _ in range(3)]
    for waiter in makers[1:]:
        assert waiter.stdout is not None and waiter.stdout.readline() == "waiting\n"
    makers[0].kill()
    makers[0].wait()
    said = [waiter.communicate(timeout=60)[0] for waiter in makers[1:]]
    assert sorted(said) == ["", "", "making\n"] and [waiter.returncode for waiter in makers[1:]] == [0, 0, 0]
    assert files(tmp_path) == []


def test_who_is_there_or_may_be_is_waited_for_and_who_is_silent_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOST_SECONDS", 1.0)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    workspace, waited = Workspace.at(tmp_path), []
    create(workspace.lease("k") / "000001.json", Lease(owner="elsewhere:1", beat=7).model_dump_json().encode())
    started = time.monotonic()
    with sole_maker(workspace, "k", lambda: False, waited.append):
        assert time.monotonic() - started > 1 and waited == ["elsewhere:1"]
        assert files(tmp_path) == ["000001.json", "000002.json"]
    started = time.monotonic()
    with sole_maker(workspace, "k", lambda: False, waited.append):  # the one before stopped and said so
        assert time.monotonic() - started < 1 and waited == ["elsewhere:1"]


def test_a_maker_tells_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    workspace = Workspace.at(tmp_path)
    path = workspace.lease("k") / "000001.json"
    with sole_maker(workspace, "k", lambda: False, print):
        time.sleep(0.5)
        assert Lease.model_validate_json(path.read_bytes()).beat > 2
    assert Lease.model_validate_json(path.read_bytes()).ended
