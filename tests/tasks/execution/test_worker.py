"""A process that makes parts: its signs of life, and what becomes of it when a part hangs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import State
from prefect.futures import PrefectConcurrentFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed

from storage_schemas.runs.attempts import ShardState, read_attempts
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.execution import worker
from tasks.execution.fan_out import PartReference, _take
from tasks.execution.outcomes import Outcome, PartHangs
from tasks.execution.worker import LOST_DEVICE, Worker, coordinate_here, raise_if_hung
from tests.prefect_processes import free_port
from tests.tasks.configs import document


def context(folder: Path) -> Context:
    return Context(PipelineConfig.model_validate(document(workspace=str(folder))), "hash")


def ended_with(work: Callable[[], object]) -> tuple[int, float]:
    """Exit code of a process that does this work, and how long it lived."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(99)
    while time.monotonic() - started < 20:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), time.monotonic() - started
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("it hangs for ever")


def test_a_process_that_cannot_show_that_it_lives_stops_at_the_next_micro_batch(
    tmp_path: Path,
) -> None:
    workspace = Workspace(tmp_path)
    workspace.beats("run").parent.mkdir(parents=True)
    workspace.beats("run").write_text("a file where the folder of the beats should be")
    at_work = Worker(workspace, "run")
    deadline = time.monotonic() + 10
    with pytest.raises(OSError, match="workers"), at_work.at_work(context(tmp_path), "scores", 3, None):
        while time.monotonic() < deadline:
            at_work.stop_if_asked()
            time.sleep(0.05)
    (attempt,) = (each for each in read_attempts(workspace, "run")[3] if each.state == ShardState.failed)
    assert "workers" in attempt.error


def test_a_worker_process_that_hangs_over_a_part_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def hang() -> None:
        with Worker(Workspace(tmp_path), "run").at_work(context(tmp_path), "scores", 3, timeout=0.4):
            time.sleep(60)

    code, seconds = ended_with(hang)
    assert code == 1 and 0.5 < seconds < 10
    assert "in hang" in capfd.readouterr().err, "where it hangs"
    (attempt,) = read_attempts(Workspace(tmp_path), "run")[3]
    assert attempt.state == ShardState.running, "a death over the part"


def test_a_coordinator_whose_own_thread_hangs_names_the_part_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coordinate() -> None:
        coordinate_here("run")
        at_work = Worker(Workspace(tmp_path), "run")

        def hang() -> None:
            with at_work.at_work(context(tmp_path), "scores", 3, timeout=0.4):
                time.sleep(60)

        threading.Thread(target=hang).start()
        try:
            while True:
                raise_if_hung("run", 0.4)
                time.sleep(0.1)
        except PartHangs as error:
            (tmp_path / "said").write_text(str(error))
        time.sleep(60)

    monkeypatch.setattr(worker, "LAST_WORDS_SECONDS", 0.5)
    code, seconds = ended_with(coordinate)
    assert code == LOST_DEVICE and seconds < 10
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert "scores 00003 hangs" in line and "fastgda retry run" in line
    assert read_attempts(Workspace(tmp_path), "run")[3][-1].error_class == "PartHangs"


def future_of(result: State[object] | BaseException) -> PrefectConcurrentFuture[PartReference]:
    wrapped: Future[object] = Future()
    if isinstance(result, BaseException):
        wrapped.set_exception(result)
    else:
        wrapped.set_result(result)
    return PrefectConcurrentFuture(uuid4(), wrapped)


def test_an_error_while_progress_is_shown_is_no_failure_of_the_part() -> None:
    def show(number: int) -> None:
        raise OSError("the progress bar's terminal is gone")

    outcome = Outcome()
    with pytest.raises(OSError, match="terminal is gone"):
        _take(outcome, future_of(Completed()), "scores", 7, show)
    assert outcome.failures == {}


def test_a_runner_whose_process_died_is_not_asked_for_a_state() -> None:
    outcome = Outcome()
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        _take(outcome, future_of(KeyError("killed")), "scores", 7, lambda number: None)
        _take(outcome, future_of(BrokenProcessPool("died")), "scores", 8, lambda number: None)
    assert outcome.failures.keys() == {7} and outcome.failures[7].error_class == "KeyError"
    assert outcome.worker_lost
