"""How a coordinator comes to a complete stage: what it makes, gives up, waits for, and says."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage_schemas import tables
from storage_schemas.errors import StoreError
from storage_schemas.runs.attempts import AttemptLog, ShardState, read_attempts
from storage_schemas.runs.ledger import done_shards, ledger_as_written, read_ledger, read_run
from storage_schemas.runs.liveness import RunRequest, ask, asked, read_assignment, withdraw
from tasks.execution import coordinator, fan_out, worker
from tasks.execution.coordinator import Coordinator, begin_run
from tasks.execution.fan_out import DeviceLost
from tasks.execution.outcomes import PartHangs, RunCancelled, RunIncomplete, RunRefused
from tasks.execution.retry import release
from tasks.watching.run_status import run_status
from tests.tasks.letters import LETTERS, RUN, Letters, run_of, taught_by_letters
from tests.tasks.without_prefect import Here, made_here


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    monkeypatch.setattr(worker, "LOOK_SECONDS", {True: 0.0})
    monkeypatch.setattr(coordinator, "PAUSE_LOOK_SECONDS", 0.01)
    return taught_by_letters(monkeypatch)


def begun(letters: Letters, kind: str = "letters") -> list[int]:
    return [number for each, number in letters.begun if each == kind]


def test_a_run_is_planned_once_and_makes_what_is_missing_in_order(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runners, run) = made_here(monkeypatch), run_of(tmp_path)
    run.parts["letters"].make(1)
    letters.begun.clear()
    with begin_run.fn(run) as makers:
        (made,) = map(makers.make, makers.before("scores"))
        scores = makers.make("scores")
    assert begun(letters) == [0, 2, 3, 4] and begun(letters, "scores") == [0, 1, 2]
    assert (made.reused, made.artifact.name, made.artifact.rows) == (False, "all letters", LETTERS)
    assert scores.artifact.name == "teacher scores" and scores.artifact.key == RUN
    (runner,) = runners
    assert runner.ended, "its processes end with the run"
    shards = [tables.read(run.scores.path(number), tables.SCORES).to_pydict() for number in range(3)]
    assert [shard["query_id"] for shard in shards] == [["q0"] * 4, ["q1"] * 4, ["q2"] * 4]
    assert [shard["score"] for shard in shards] == [[10.0 * n + i for i in range(4)] for n in range(3)]
    assert set(ledger_as_written(run.workspace, RUN)["state"].to_pylist()) == {"done"}

    planned, letters.begun[:] = read_run(run.workspace, RUN), []
    with begin_run.fn(run) as makers:
        again = [*map(makers.make, makers.before("scores")), makers.make("scores")]
    assert all(each.reused for each in again) and letters.begun == [] and len(runners) == 1
    assert again[1].seconds == pytest.approx(scores.seconds)
    assert read_run(run.workspace, RUN) == planned


def test_what_fails_is_named_and_all_else_is_made(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here(monkeypatch)
    run = run_of(tmp_path)
    letters.faults = {("letters", 1): [ValueError("no such letter")], ("letters", 3): [KeyError("d")]}
    with begin_run.fn(run) as makers, pytest.raises(RunIncomplete) as caught:
        makers.make("letters")
    assert [(each.number, each.error_class) for each in caught.value.failures] == [(1, "ValueError"), (3, "KeyError")]
    said = str(caught.value)
    assert "2 of 5 parts of 'letters' failed" in said and "letters 00001: ValueError: no such letter" in said
    assert f"fastgda retry {RUN}" in said
    assert run.parts["letters"].missing() == [1, 3]
    failures = run_status(run.workspace, RUN).failures
    assert [failure.name for failure in failures] == ["letters 00001", "letters 00003"]

    letters.begun.clear()
    with begin_run.fn(run) as makers:
        assert not makers.make("letters").reused
    assert begun(letters) == [1, 3], "the next start takes up what failed"


def test_scores_may_be_published_without_what_failed(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here(monkeypatch)
    run = run_of(tmp_path)
    letters.faults["scores", 2] = [FloatingPointError("no number")]
    with begin_run.fn(run) as makers:
        assert makers.make_unless_incomplete("scores") is None
        assert done_shards(run.workspace, RUN) == {0, 1}
        assert makers.make_unless_incomplete("scores") is not None
    rows = ledger_as_written(run.workspace, RUN).to_pylist()
    assert [(row["state"], row["attempts"]) for row in rows] == [("done", 1), ("done", 1), ("done", 2)]


def test_a_part_that_kills_its_process_is_found_alone_given_up_and_taken_up_again(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners, run = made_here(monkeypatch, deadly=(2,)), run_of(tmp_path, execution={"max_deaths": 3})
    with begin_run.fn(run) as makers, pytest.raises(RunIncomplete, match="3 worker processes died while they made it"):
        makers.make("letters")
    assert [runner.given for runner in runners] == [[0, 1, 2, 3, 4], [2], [2], [3, 4]]
    assert all(runner.ended for runner in runners)
    assert run.parts["letters"].missing() == [2] and begun(letters) == [0, 1, 3, 4]
    assert read_attempts(run.workspace, RUN, "letters")[2][-1].state == ShardState.quarantined

    letters.begun.clear()
    with begin_run.fn(run) as makers, pytest.raises(RunIncomplete, match="1 of 5 parts"):
        makers.make("letters")
    assert begun(letters) == [], "it is not tried again by itself"
    made_here(monkeypatch)
    assert release.fn(str(tmp_path), RUN) == 1
    with begin_run.fn(run) as makers:
        makers.make("letters")
    assert begun(letters) == [2]


def test_a_paused_run_waits_and_goes_on(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_here(monkeypatch)
    run = run_of(tmp_path)
    resumed = threading.Timer(0.3, lambda: withdraw(run.workspace, RUN))

    def pause() -> None:
        ask(run.workspace, RUN, RunRequest.pause)
        resumed.start()

    letters.faults["letters", 1] = [pause]
    with begin_run.fn(run) as makers:
        made = makers.make("letters")
    assert made.artifact.rows == LETTERS and run.parts["letters"].missing() == []
    assert resumed.finished.is_set() and begun(letters) == [0, 1, 2, 3, 4]
    assert f"paused: `fastgda resume {RUN} " in capsys.readouterr().err


def test_a_cancelled_run_keeps_what_is_finished_and_the_next_start_forgets_the_wish(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here(monkeypatch)
    run = run_of(tmp_path)
    letters.faults["letters", 1] = [lambda: ask(run.workspace, RUN, RunRequest.cancel)]
    with begin_run.fn(run) as makers, pytest.raises(RunCancelled, match=rf"`fastgda retry {RUN} .*` goes on"):
        makers.make("letters")
    assert run.parts["letters"].missing() == [2, 3, 4], "the part under way was finished"
    assert run_status(run.workspace, RUN).state == "cancelled"
    with begin_run.fn(run) as makers:
        assert asked(run.workspace, RUN) is None
        makers.make("letters")
    assert begun(letters) == [0, 1, 2, 3, 4]


def test_a_run_that_is_cancelled_in_prefect_stops_too(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here(monkeypatch)
    run = run_of(tmp_path, execution={"window": 1})
    monkeypatch.setattr(fan_out, "TICK_SECONDS", 0.0)
    monkeypatch.setattr(coordinator.cancellation, "requested", lambda: len(letters.begun) >= 2)
    with begin_run.fn(run) as makers, pytest.raises(RunCancelled):
        makers.make("letters")
    assert begun(letters) == [0, 1]


def test_a_part_that_is_made_under_another_key_is_no_endless_loop(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here(monkeypatch)
    run, letters.written_key = run_of(tmp_path), "another"
    with begin_run.fn(run) as makers, pytest.raises(RuntimeError, match="letters 00000 was made and is not there"):
        makers.make("letters")


def test_scores_that_leave_out_too_many_samples_are_refused(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here(monkeypatch)
    run, letters.left_out = run_of(tmp_path), dict.fromkeys(range(3), "torn")
    with begin_run.fn(run) as makers, pytest.raises(RunRefused, match=r"3 of 4 samples had to be left out.*torn"):
        makers.make("scores")
    letters.left_out = {}
    assert release.fn(str(tmp_path), RUN) == 3, "each of the shards left samples out"
    with begin_run.fn(run) as makers:
        assert makers.make("scores").artifact.rows == 12
    assert read_assignment(run.workspace, RUN).generation == 1, "workers load anew what they have in memory"


def test_only_the_shards_that_are_named_are_released(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here(monkeypatch)
    run = run_of(tmp_path)
    letters.faults = {("scores", number): [ValueError("x")] for number in range(3)} | {
        ("letters", 0): [ValueError("y")]
    }
    with begin_run.fn(run) as makers:
        assert makers.make_unless_incomplete("letters") is None
        assert makers.make_unless_incomplete("scores") is None
    ask(run.workspace, RUN, RunRequest.pause)
    assert release.fn(str(tmp_path), RUN, "1-2") == 2
    assert read_ledger(run.workspace, RUN)["state"].to_pylist() == ["failed", "pending", "pending"]
    assert read_attempts(run.workspace, RUN, "letters")[0], "other kinds are left as they are"
    assert asked(run.workspace, RUN) is None, "a retry goes on"
    with pytest.raises(ValueError, match="has no shard 7"):
        release.fn(str(tmp_path), RUN, "7")


def test_the_seconds_of_a_part_are_estimated_and_then_measured(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here(monkeypatch)
    run = run_of(tmp_path, execution={"forwards_per_second": 5.0})
    makers = begin_run.fn(run)
    assert makers.part_seconds == {"letters": 2.0, "scores": 4.0}
    letters.seconds = 7.0
    with makers, makers._watched("letters", list(range(LETTERS))) as watch:
        assert watch.part_seconds() == 2.0
        for number in range(3):
            run.parts["letters"].make(number)
            watch.finished(number)
            watch.finished(number)
        assert watch.part_seconds() == pytest.approx(7.0, abs=0.5)
        assert watch.left == {3, 4}


def test_a_process_whose_device_is_lost_does_not_go_on(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runners, run) = made_here(monkeypatch), run_of(tmp_path)
    letters.faults["letters", 1] = [RuntimeError("CUDA error: an illegal memory access was encountered")]
    with begin_run.fn(run) as makers, pytest.raises(DeviceLost, match="illegal memory access"):
        makers.make("letters")
    assert runners[0].ended


def test_a_runner_with_a_thread_that_hangs_is_not_waited_for(tmp_path: Path, letters: Letters) -> None:
    run, runner = run_of(tmp_path), Here()
    with pytest.raises(PartHangs), Coordinator(run, "key", {}, runner):  # type: ignore[arg-type]
        raise PartHangs("letters 00001 hangs")
    assert not runner.ended
    with pytest.raises(StoreError), Coordinator(run, "key", {}, runner):  # type: ignore[arg-type]
        raise StoreError("anything else")
    assert runner.ended


def test_an_attempt_elsewhere_that_was_given_up_counts_here(tmp_path: Path, letters: Letters) -> None:
    run = run_of(tmp_path)
    makers = begin_run.fn(run)
    log = AttemptLog(run.workspace, RUN, worker="elsewhere:7", kind="letters")
    log.record(4, ShardState.quarantined, error=MemoryError("too large"))
    (failure,) = makers._given_up("letters").values()
    assert str(failure) == "letters 00004: MemoryError: too large"
    assert datetime.now(UTC) >= read_attempts(run.workspace, RUN, "letters")[4][-1].at
