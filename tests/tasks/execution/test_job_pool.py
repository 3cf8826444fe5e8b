"""Jobs of a work pool from their start to their end, with a pool of which every whim is known.

What a real server does with them is tested in `test_jobs.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Running, Scheduled

from fastgda_core.errors import UsageError
from storage_schemas.runs.liveness import Beat, RunRequest, ask, asked, write_beat
from storage_schemas.workspace import Workspace
from tasks.execution import coordinator, jobs
from tasks.execution.coordinator import begin_run
from tasks.execution.fan_out import make_part
from tasks.execution.number_ranges import from_ranges
from tasks.execution.outcomes import RunCancelled, RunIncomplete
from tasks.teaching.run import Run
from tests.tasks.letters import LETTERS, RUN, Letters, run_of, taught_by_letters

H100, A10 = "make parts/h100", "make parts/a10"


@dataclass
class Pool:
    """A Prefect server and its workers: a job is done by `work` as soon as it is asked for.

    work: does a job and says how it stands then.
    forced: what a coordinator said of a job.
    """

    work: Callable[[dict[str, Any]], State[Any]]
    runs: dict[UUID, FlowRun] = field(default_factory=dict)
    forced: list[tuple[UUID, str]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    deployments: dict[str, UUID] = field(default_factory=lambda: {H100: uuid4(), A10: uuid4()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run_deployment(self, name: str, parameters: dict[str, Any], **more: Any) -> FlowRun:
        if name not in self.deployments:
            raise ObjectNotFound(Exception("404"))
        self.asked.append((name, parameters["numbers"]))
        return self.add(name, parameters, more["tags"], self.work(parameters))

    def add(self, name: str, parameters: dict[str, Any], tags: list[str], state: State[Any]) -> FlowRun:
        made = FlowRun(
            id=uuid4(),
            flow_id=uuid4(),
            name="job",
            parameters=parameters,
            tags=tags,
            state=state,
            deployment_id=self.deployments[name],
        )
        self.runs[made.id] = made
        return made

    def read_flow_runs(self, flow_run_filter: Any, limit: int) -> list[FlowRun]:
        wanted = flow_run_filter.id
        if wanted is not None and wanted.any_ is not None:
            return [self.runs[each] for each in wanted.any_]
        kinds, tags = flow_run_filter.state.type.any_, flow_run_filter.tags.all_
        return [run for run in self.runs.values() if run.state.type in kinds and set(tags) <= set(run.tags)]

    def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(id=self.deployments[name])

    def set_flow_run_state(self, run: UUID, state: State[Any], force: bool) -> None:
        assert force
        self.forced.append((run, state.type.value))
        self.runs[run] = self.runs[run].model_copy(update={"state": state})


def done(parameters: dict[str, Any]) -> State[Any]:
    """As the job's flow does it: what fails stops nothing else."""
    for number in from_ranges(parameters["numbers"]):
        try:
            made = make_part.fn(parameters["location"], RUN, parameters["assignment"], parameters["kind"], number, None)
        except Exception:
            continue
        if isinstance(made, State):
            return Completed(message="stopped as somebody asked")
    return Completed()


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    now = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now + 10 * (time.monotonic() - now), sleep=time.sleep)
    monkeypatch.setattr(jobs, "time", clock)  # ten times as fast from now on
    monkeypatch.setattr(coordinator, "PAUSE_LOOK_SECONDS", 0.01)
    return taught_by_letters(monkeypatch)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    found = Pool(done)
    monkeypatch.setattr(jobs, "get_client", lambda **_: found)
    monkeypatch.setattr(jobs, "run_deployment", found.run_deployment)
    return found


def pooled(root: Path, **execution: object) -> Run:
    return run_of(root, execution={"runner": "pool", "pools": [{"deployment": H100}], **execution})


def numbers(pool: Pool) -> list[str]:
    return [each for _, each in pool.asked]


def test_every_part_is_made_by_some_job_and_by_one_alone(tmp_path: Path, letters: Letters, pool: Pool) -> None:
    run = pooled(tmp_path)
    with begin_run.fn(run) as makers:
        made = makers.make("letters")
        scores = makers.make("scores")
    assert made.artifact.rows == LETTERS and scores.artifact.rows == 12
    assert numbers(pool) == ["0-2", "3", "4", "0-1", "2"], "fewer towards the end, so that all end at once"
    assert letters.begun == [*(("letters", n) for n in range(5)), *(("scores", n) for n in range(3))]
    assert {tuple(run.tags) for run in pool.runs.values()} == {
        ("fastgda", f"run:{RUN}", f"kind:{kind}") for kind in ("letters", "scores")
    }
    assert pool.forced == []


def test_parts_are_shared_among_the_pools(tmp_path: Path, letters: Letters, pool: Pool) -> None:
    run = pooled(tmp_path, pools=[{"deployment": H100}, {"deployment": A10}])
    with begin_run.fn(run) as makers:
        makers.make("letters")
    assert pool.asked[:2] == [(H100, "0-1"), (A10, "2")]
    assert run.parts["letters"].missing() == []


def test_what_fails_in_a_job_is_that_parts_failure(tmp_path: Path, letters: Letters, pool: Pool) -> None:
    letters.faults["letters", 1] = [ValueError("no such letter")]
    with begin_run.fn(pooled(tmp_path)) as makers, pytest.raises(RunIncomplete, match="letters 00001: ValueError"):
        makers.make("letters")
    assert [number for _, number in letters.begun] == [0, 1, 2, 3, 4]


def test_jobs_that_end_before_they_start_anything_are_not_asked_for_without_end(
    tmp_path: Path, letters: Letters, pool: Pool
) -> None:
    pool.work = lambda _: Crashed(message="no such image")
    with begin_run.fn(pooled(tmp_path)) as makers, pytest.raises(UsageError, match="5 jobs in a row ended before"):
        makers.make("letters")
    assert len(pool.asked) == jobs.IDLE_JOBS and letters.begun == []


def test_the_parts_of_a_job_that_gives_no_sign_of_life_are_given_to_others(
    tmp_path: Path, letters: Letters, pool: Pool
) -> None:
    answers = iter([Running()])
    pool.work = lambda parameters: next(answers, None) or done(parameters)
    run = pooled(tmp_path, lost_after=2)
    with begin_run.fn(run) as makers:
        makers.make("letters")
    ((lost, state),) = pool.forced
    assert state == "CRASHED" and pool.runs[lost].parameters["numbers"] == "0-2"
    assert numbers(pool)[1] == "0-2" and run.parts["letters"].missing() == []


def test_a_job_that_hangs_over_a_part_is_told_to_end(tmp_path: Path, letters: Letters, pool: Pool) -> None:
    run = pooled(tmp_path, lost_after=5, timeout_floor=1.0, forwards_per_second=1000.0)

    def work(parameters: dict[str, Any]) -> State[Any]:
        return Running() if len(pool.asked) == 1 else done(parameters)

    pool.work = work
    original = pool.read_flow_runs

    def hanging(flow_run_filter: Any, limit: int) -> list[FlowRun]:
        found = original(flow_run_filter, limit)
        for job in found:
            if job.state.is_running():
                beat = Beat(worker="gpu-7:1", beat=1, at=datetime.now(UTC), job=str(job.id), kind="letters")
                write_beat(run.workspace, RUN, beat.model_copy(update={"part_seconds": 1e4}))
        return found

    pool.read_flow_runs = hanging  # type: ignore[method-assign]
    with begin_run.fn(run) as makers:
        makers.make("letters")
    assert [state for _, state in pool.forced] == ["CANCELLING", "CRASHED"], "told once, and given up when it is silent"
    assert run.parts["letters"].missing() == []


def test_jobs_of_a_coordinator_that_died_are_taken_over(tmp_path: Path, letters: Letters, pool: Pool) -> None:
    run = pooled(tmp_path, lost_after=3600)
    makers = begin_run.fn(run)
    tags = ["fastgda", f"run:{RUN}", "kind:letters"]
    under_way = pool.add(H100, {"numbers": "1-3"}, tags, Running())
    pool.add(H100, {"numbers": "0-4"}, ["fastgda", "run:another", "kind:letters"], Running())
    looks = iter(range(100))
    original = pool.read_flow_runs

    def soon_done(flow_run_filter: Any, limit: int) -> list[FlowRun]:
        if next(looks) == 3:
            done({"location": str(tmp_path), "assignment": makers.assignment, "kind": "letters", "numbers": "1-3"})
            pool.runs[under_way.id] = under_way.model_copy(update={"state": Completed()})
        return original(flow_run_filter, limit)

    pool.read_flow_runs = soon_done  # type: ignore[method-assign]
    with makers:
        makers.make("letters")
    assert numbers(pool) == ["0", "4"], "its slot is taken until it ends, and its parts are nobody else's"
    assert sorted(number for _, number in letters.begun) == [0, 1, 2, 3, 4]


def test_a_cancelled_run_calls_off_the_jobs_that_wait(
    tmp_path: Path, letters: Letters, pool: Pool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "UNTAKEN_SECONDS", 0.0)
    run = pooled(tmp_path)

    def waits(_: dict[str, Any]) -> State[Any]:
        ask(Workspace(tmp_path), RUN, RunRequest.cancel)
        return Scheduled()

    pool.work = waits
    with begin_run.fn(run) as makers, pytest.raises(RunCancelled):
        makers.make("letters")
    assert [state for _, state in pool.forced] == ["CANCELLED"] and letters.begun == []
    assert asked(run.workspace, RUN) == RunRequest.cancel
    assert f"no worker has taken a job of {H100}" in capsys.readouterr().err.replace("\n", " ")


def test_a_deployment_that_is_not_there_is_named(tmp_path: Path, letters: Letters, pool: Pool) -> None:
    run = pooled(tmp_path, pools=[{"deployment": "make parts/h200"}])
    with begin_run.fn(run) as makers, pytest.raises(UsageError, match="names the deployment 'make parts/h200'"):
        makers.make("letters")
