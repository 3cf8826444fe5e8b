"""Parts handed to a task runner, a window of them at a time, and how each of them ends."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import State
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Cancelled, Completed, Failed

from fastgda_core import interruption
from storage_schemas.commit import committed
from storage_schemas.runs.attempts import read_attempts
from storage_schemas.runs.liveness import read_beats
from tasks.config.execution import ExecutionConfig
from tasks.execution import fan_out
from tasks.execution.coordinator import begin_run
from tasks.execution.fan_out import WorkOrder, _is_transient, end_of_job, make_part, run_parts
from tasks.execution.outcomes import Failure, Outcome
from tests.tasks.letters import LETTERS, RUN, Letters, run_of, taught_by_letters


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    return taught_by_letters(monkeypatch)


@dataclass
class Slow:
    """A task runner whose tasks end in the order in which they came, one when the window is full or nothing comes."""

    how: dict[int, State[Any] | BaseException] = field(default_factory=dict)
    waiting: list[tuple[int, Future[Any]]] = field(default_factory=list)
    most: int = 0
    given: list[int] = field(default_factory=list)

    def submit(self, task: Any, parameters: dict[str, Any]) -> PrefectConcurrentFuture[Any]:
        wrapped: Future[Any] = Future()
        self.given.append(parameters["number"])
        self.waiting.append((parameters["number"], wrapped))
        self.most = max(self.most, len(self.waiting))
        threading.Timer(0.02, self._end_one).start()
        return PrefectConcurrentFuture(uuid4(), wrapped)

    def _end_one(self) -> None:
        number, wrapped = self.waiting.pop(0)
        how = self.how.get(number, Completed())
        if isinstance(how, BaseException):
            wrapped.set_exception(how)
        else:
            wrapped.set_result(how)


def order(folder: Path, **execution: object) -> WorkOrder:
    return WorkOrder(str(folder), RUN, "key", "letters", ExecutionConfig.model_validate(execution))


def test_no_more_parts_are_under_way_than_the_window_holds(tmp_path: Path) -> None:
    runner, finished = Slow(), list[int]()
    outcome = run_parts(order(tmp_path, window=3), range(10), runner, lambda: None, finished=finished.append)  # type: ignore[arg-type]
    assert outcome == Outcome() and sorted(finished) == list(range(10)) == runner.given
    assert runner.most == 3


def test_each_part_ends_in_its_own_way(tmp_path: Path) -> None:
    runner = Slow({1: Failed(data=KeyError("b")), 2: ValueError("the runner's own"), 3: Cancelled(message="asked")})
    finished: list[int] = []
    outcome = run_parts(order(tmp_path), range(5), runner, lambda: None, finished=finished.append)  # type: ignore[arg-type]
    assert finished == [0, 4] and outcome.stopped and not outcome.worker_lost
    assert {number: each.error_class for number, each in outcome.failures.items()} == {1: "KeyError", 2: "ValueError"}


def test_nothing_new_is_begun_once_somebody_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_out, "TICK_SECONDS", 0.03)
    runner = Slow()
    outcome = run_parts(order(tmp_path, window=1), range(100), runner, lambda: None, tick=lambda: False)  # type: ignore[arg-type]
    assert outcome.stopped and len(runner.given) < 10 and runner.waiting == []


def test_a_part_that_is_there_costs_nothing_and_a_new_one_is_recorded(tmp_path: Path, letters: Letters) -> None:
    run = run_of(tmp_path)
    key = begin_run.fn(run).assignment
    first, again = (make_part.fn(str(tmp_path), RUN, key, "letters", 2, None) for _ in range(2))
    assert first == again and letters.begun == [("letters", 2)]
    parts = run.parts["letters"]
    manifest = committed(parts.path(2), parts.key(2))
    assert manifest is not None and first.sha256 == manifest.sha256 and first.rows == 1
    assert run.workspace.file(first.path).read_bytes() == b"c"
    assert [each.state for each in read_attempts(run.workspace, RUN, "letters")[2]] == ["running"]
    end_of_job(order(tmp_path), Outcome())
    assert all(beat.ended for beat in read_beats(run.workspace, RUN))


def test_a_process_that_is_to_stop_begins_no_part(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = begin_run.fn(run_of(tmp_path)).assignment
    monkeypatch.setattr(fan_out, "stopping", lambda: True)
    state = make_part.fn(str(tmp_path), RUN, key, "letters", 0, None)
    assert isinstance(state, State) and state.is_cancelled() and letters.begun == []
    assert interruption.stopping() is False


def test_only_what_may_pass_is_tried_again() -> None:
    def tried_again(error: BaseException) -> bool:
        return _is_transient(make_part, None, Failed(data=error))  # type: ignore[arg-type]

    assert tried_again(ConnectionResetError(104, "reset"))
    assert not tried_again(KeyError("a bug"))
    assert not tried_again(RuntimeError("CUDA error: device-side assert triggered")), "not by the same process"
    assert not _is_transient(make_part, None, Completed(data="a part"))  # type: ignore[arg-type]


def test_a_job_says_how_it_ended(tmp_path: Path) -> None:
    assert end_of_job(order(tmp_path), Outcome()) == "all there"
    assert end_of_job(order(tmp_path), Outcome(stopped=True)) == "stopped as somebody asked"
    failures = {number: Failure("letters", number, "KeyError", "x") for number in (3, 1)}
    with pytest.raises(RuntimeError, match="letters 00001: KeyError: x\nletters 00003"):
        end_of_job(order(tmp_path), Outcome(failures))


def test_letters_are_what_these_tests_take_them_for(tmp_path: Path, letters: Letters) -> None:
    parts = run_of(tmp_path).parts["letters"]
    assert parts.missing() == list(range(LETTERS)) and parts.standing().seconds == 0
    parts.make(3)
    assert list(parts.committed()) == [3] and parts.path(3).read_bytes() == b"d"
