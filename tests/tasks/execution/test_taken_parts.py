"""A process that takes parts by itself, in this one; what Slurm does with many of them: `test_job_arrays.py`."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fastgda_core import interruption
from storage_schemas.files import create
from storage_schemas.runs import lease
from storage_schemas.runs.attempts import read_attempts
from storage_schemas.runs.lease import Claims, Lease
from storage_schemas.runs.liveness import RunRequest, ask, read_beats
from storage_schemas.runs.orders import Order, read_order, withdraw_order, write_order
from storage_schemas.workspace import Workspace
from tasks.execution import array_task, taken_parts, worker
from tasks.execution.coordinator import begin_run
from tasks.execution.taken_parts import TakenParts
from tasks.teaching.run import Run
from tests.tasks.letters import RUN, Letters, run_of, taught_by_letters

NONE = "there is nothing to take"


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    monkeypatch.setattr(taken_parts, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(worker, "LOOK_SECONDS", {True: 0.0})
    return taught_by_letters(monkeypatch)


def ordered(folder: Path, kind: str = "letters", numbers: str = "0-4", **execution: object) -> tuple[Run, TakenParts]:
    """A run whose parts are ordered, and a process that has not begun."""
    run = run_of(folder, execution={"runner": "slurm", "slurm": {"idle_seconds": 0.05}, **execution})
    key = begin_run.fn(run).assignment
    write_order(run.workspace, RUN, Order(assignment=key, kind=kind, numbers=numbers, given_by="login:1"))
    return run, TakenParts(str(folder), RUN, run.config.execution, share=0.5)


def test_it_makes_all_from_its_place_in_the_list_on_and_leaves_no_lease(tmp_path: Path, letters: Letters) -> None:
    run, taken = ordered(tmp_path)
    assert taken.make_all() == NONE and taken.made == 5
    assert letters.begun == [("letters", number) for number in (2, 3, 4, 0, 1)]
    assert run.parts["letters"].missing() == [] and list((tmp_path / "leases").iterdir()) == []
    assert all(beat.ended for beat in read_beats(run.workspace, RUN))


def test_a_part_that_another_process_is_at_is_left_to_it_and_taken_when_that_one_is_dead(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, taken = ordered(tmp_path, slurm={"idle_seconds": 1.0})
    parts, workspace = run.parts["letters"], run.workspace
    held = {number: workspace.lease(taken_parts._lease_of(parts, number)) for number in (1, 3)}
    for folder in held.values():
        create(folder / "000001.json", Lease(owner="elsewhere:1").model_dump_json().encode())
    monkeypatch.setattr(lease, "LOST_SECONDS", 0.5)
    threading.Timer(
        0.2, lambda: create(held[1] / "000002.json", Lease(owner="b:2", ended=True).model_dump_json().encode())
    )
    begun = time.monotonic()
    assert taken.make_all() == NONE and taken.made == 5
    assert [number for _, number in letters.begun][:3] == [2, 4, 0] and time.monotonic() - begun > 0.5


def test_of_two_claims_of_one_thing_one_is_granted(tmp_path: Path) -> None:
    first, second = Claims(Workspace.at(tmp_path)), Claims(Workspace.at(tmp_path))
    with first.claim("k") as mine, second.claim("k") as theirs, second.claim("another") as other:
        assert (mine, theirs, other) == (True, False, True)
    with second.claim("k") as theirs:
        assert theirs
    assert list((tmp_path / "leases").iterdir()) == []


def test_what_may_pass_is_tried_again_and_what_may_not_holds_nothing_else_up(tmp_path: Path, letters: Letters) -> None:
    run, taken = ordered(tmp_path, retries=1, retry_delay=0.01)
    letters.faults = {
        ("letters", 0): [ConnectionResetError(104, "reset")],
        ("letters", 2): [ConnectionResetError(104, "reset")] * 2,
        ("letters", 3): [KeyError("a bug")],
    }
    assert taken.make_all() == NONE and taken.made == 3
    assert run.parts["letters"].missing() == [2, 3]
    tried = read_attempts(run.workspace, RUN, "letters")
    assert [each.state for each in tried[2]] == ["running", "failed"] * 2 and len(tried[3]) == 2
    again = read_order(run.workspace, RUN)
    assert again is not None
    write_order(run.workspace, RUN, again.model_copy(update={"given_by": "login:2"}))
    assert taken.make_all() == NONE and taken.made == 5, "another coordinator wants them once more"


@pytest.mark.parametrize("wish", RunRequest)
def test_it_ends_when_the_run_is_to_stop(tmp_path: Path, letters: Letters, wish: RunRequest) -> None:
    run, taken = ordered(tmp_path)
    letters.faults = {("letters", 3): [lambda: ask(run.workspace, RUN, wish)]}
    assert taken.make_all() == "the run is to pause or to stop"
    assert len(run.parts["letters"].missing()) == 3


def test_it_ends_when_nothing_is_wanted_any_more(tmp_path: Path, letters: Letters) -> None:
    run, taken = ordered(tmp_path)
    letters.faults = {("letters", 3): [lambda: withdraw_order(run.workspace, RUN)]}
    assert taken.make_all() == "the run wants nothing more" and taken.made == 2


def test_a_task_that_is_told_to_end_says_by_its_exit_code_whether_it_was_of_use(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    for name, value in {"ID": 3, "MIN": 2, "MAX": 5}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert array_task._share() == 0.25
    monkeypatch.setattr(array_task.signal, "signal", lambda *_: None)
    stopped = threading.Event()
    monkeypatch.setattr(interruption, "_stop", stopped)
    letters.faults = {("letters", 1): [stopped.set], ("letters", 2): [stopped.set]}
    assert array_task.main(str(tmp_path), RUN) == 0, "one part was made"
    assert array_task.main(str(tmp_path), RUN) == array_task.NOTHING_MADE
    assert worker.slurm_task() == "12_3"
