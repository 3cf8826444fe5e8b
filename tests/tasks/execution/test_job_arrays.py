"""Job arrays from their submission to their end: the processes are real, and the queue is a folder of this machine.

Against Slurm itself: `tests/orchestration/test_slurm.py`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgda_core.errors import UsageError
from storage_schemas.runs.attempts import AttemptLog, ShardState, read_attempts
from storage_schemas.runs.liveness import Beat, RunRequest, ask, read_beats, withdraw, write_beat
from storage_schemas.runs.orders import read_order, read_queue
from tasks.config.execution import ExecutionConfig
from tasks.config.packages import require_runner
from tasks.config.slurm import SlurmConfig
from tasks.execution import coordinator, job_arrays, slurm_commands
from tasks.execution.array_script import written_script
from tasks.execution.coordinator import begin_run
from tasks.execution.fan_out import WorkOrder
from tasks.execution.job_arrays import JobArrays
from tasks.execution.outcomes import Failure, RunCancelled
from tasks.execution.slurm_commands import TaskState
from tasks.teaching.run import Run
from tests import local_slurm
from tests.tasks.letters import RUN, Letters, run_of, taught_by_letters

PYTHON = f"{sys.executable} -m tests.tasks.execution.letter_task"
AT_ONCE = {"poll_seconds": 0.3, "idle_seconds": 20, "python": PYTHON}
FAILING = {**AT_ONCE, "setup": ["echo no such module: cuda", "exit 3"]}


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    monkeypatch.setattr(job_arrays, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(coordinator, "PAUSE_LOOK_SECONDS", 0.1)
    return taught_by_letters(monkeypatch)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slurm"
    slurm_commands.most_tasks.cache_clear()
    for name, value in local_slurm.install(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    return folder


def queued(root: Path, *, tasks: int = 2, slurm: dict[str, object] = AT_ONCE, **execution: object) -> Run:
    return run_of(root / "workspace", execution={"runner": "slurm", "slurm": {"tasks": tasks, **slurm}, **execution})


def states(folder: Path) -> list[str]:
    return [str(known["state"]) for known in local_slurm.queue(folder).values()]


def wait_until(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def alongside(*steps: Callable[[], object]) -> threading.Thread:
    def go() -> None:
        for step in steps:
            step()

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return thread


@pytest.mark.integration
def test_tasks_make_all_stages_though_one_is_killed_and_all_end_with_the_run(
    tmp_path: Path, letters: Letters, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEADLY", str(tmp_path))
    (tmp_path / "1").touch()
    run = queued(tmp_path)
    with begin_run.fn(run) as makers:
        assert makers.make("letters").artifact.rows == 5
        seen = read_queue(run.workspace, RUN)
        assert seen is not None and {task.task for task in seen.tasks} <= set(local_slurm.queue(slurm))
        assert makers.make("scores").artifact.rows == 12
    assert letters.begun == [], "the coordinator makes none"
    first, *others = read_attempts(run.workspace, RUN, "letters")[1]
    assert first.worker not in {attempt.worker for attempt in others} and len(others) == 1
    assert {beat.slurm for beat in read_beats(run.workspace, RUN)} <= set(local_slurm.queue(slurm))
    wait_until(lambda: set(states(slurm)) <= {"COMPLETED", "FAILED", "CANCELLED"})
    assert "FAILED" in states(slurm) and len(states(slurm)) <= 4 and read_order(run.workspace, RUN) is None


def arrays(run: Run) -> JobArrays:
    order = WorkOrder(str(run.workspace.root), RUN, "key", "letters", run.config.execution)
    return JobArrays(run.workspace, order, lambda: None, lambda: [1, 2])


def test_a_part_that_kills_tasks_is_given_up_unless_they_were_preempted(tmp_path: Path, letters: Letters) -> None:
    run = queued(tmp_path, max_deaths=2)
    begin_run.fn(run)
    made, failures = arrays(run), []
    for place, state in enumerate(["FAILED", "PREEMPTED", "OUT_OF_MEMORY", "NODE_FAIL"]):
        worker, task = f"node{place}:7", f"{place}_0"
        AttemptLog(run.workspace, RUN, worker=worker, kind="letters").record(1, ShardState.running)
        write_beat(run.workspace, RUN, Beat(worker=worker, slurm=task, beat=1, at=datetime.now(UTC)))
        attempts = read_attempts(run.workspace, RUN, "letters")
        failures.append(made._settle(task, TaskState(state), attempts, {1, 2}))
    assert failures[:3] == [{}, {}, {}] and failures[3][1].error_class == "WorkerLost"
    assert made._idle == 0, "they began a part"


def test_a_part_has_failed_when_no_task_tries_again(
    tmp_path: Path, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queued(tmp_path, retries=1, retry_delay=1.0)
    begin_run.fn(run)
    log, made = AttemptLog(run.workspace, RUN, kind="letters"), arrays(run)

    def failed() -> dict[int, Failure]:
        return made._failures(read_attempts(run.workspace, RUN, "letters"), {1, 2})

    now = time.monotonic()
    monkeypatch.setattr(job_arrays, "time", SimpleNamespace(monotonic=lambda: now))
    log.record(1, ShardState.running)
    log.record(1, ShardState.failed, error=ConnectionResetError(104, "reset"))
    log.record(2, ShardState.running)
    assert failed() == {}, "its task may try again"
    now += 1.5 + job_arrays.RETRY_MARGIN + 0.1
    assert list(failed()) == [1], "it did not"
    log.record(1, ShardState.running)
    assert failed() == {}
    log.record(1, ShardState.failed, error=ConnectionResetError(104, "reset"))
    assert failed()[1].error_class == "ConnectionResetError", "as often as it may"


def test_tasks_that_cannot_begin_end_the_run_with_what_they_said(tmp_path: Path, letters: Letters, slurm: Path) -> None:
    run = queued(tmp_path, slurm=FAILING)
    with begin_run.fn(run) as makers, pytest.raises(UsageError) as told:
        makers.make("letters")
    assert "tasks in Slurm ended in a row, and no part was made" in str(told.value)
    assert "FAILED NonZeroExitCode" in str(told.value) and "no such module: cuda" in str(told.value)
    assert job_arrays.IDLE_TASKS <= len(states(slurm)) <= job_arrays.IDLE_TASKS + 2


def test_tasks_that_leave_the_queue_without_a_word_are_not_waited_for(
    tmp_path: Path, letters: Letters, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_arrays, "UNSEEN_SECONDS", 0.0)
    run, over = queued(tmp_path, slurm=FAILING), threading.Event()

    def purge() -> None:
        while not over.wait(0.02):
            local_slurm.purge(slurm)

    thread = alongside(purge)
    with begin_run.fn(run) as makers, pytest.raises(UsageError, match=r"GONE it left the queue|NonZeroExitCode"):
        makers.make("letters")
    over.set()
    thread.join()


def test_what_slurm_refuses_is_told_in_its_words(tmp_path: Path, letters: Letters, slurm: Path) -> None:
    (slurm / "settings.json").write_text(json.dumps({"limit": 0}))
    with begin_run.fn(queued(tmp_path)) as makers, pytest.raises(UsageError, match="QOSMaxSubmitJobPerUserLimit"):
        makers.make("letters")


def test_arrays_are_no_larger_than_the_cluster_takes_and_share_the_limit(
    tmp_path: Path, letters: Letters, slurm: Path
) -> None:
    (slurm / "settings.json").write_text(json.dumps({"max_array": 2}))
    run = queued(tmp_path, tasks=4, slurm={**FAILING, "at_once": 2})
    with begin_run.fn(run) as makers, pytest.raises(UsageError, match="ended in a row"):
        makers.make("letters")
    assert sorted(local_slurm.queue(slurm))[:4] == ["1_0", "1_1", "2_0", "2_1"]


def test_a_controller_that_is_away_is_waited_for(
    tmp_path: Path, letters: Letters, slurm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local_slurm.away(slurm, True)
    run = queued(tmp_path, slurm=FAILING)
    back = threading.Timer(1.0, lambda: local_slurm.away(slurm, False))
    back.start()
    with begin_run.fn(run) as makers, pytest.raises(UsageError, match="ended in a row"):
        makers.make("letters")
    said = [record.message for record in caplog.records if "Slurm" in record.message]
    assert sum("Slurm is away" in line for line in said) == 1 and any("answers again" in line for line in said)


def test_a_run_that_is_cancelled_or_interrupted_leaves_nothing_in_the_queue(
    tmp_path: Path, letters: Letters, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queued(tmp_path, tasks=3, slurm={**AT_ONCE, "setup": ["sleep 60 & wait"], "at_once": 1})

    def submitted() -> bool:
        return "RUNNING" in states(slurm) and "PENDING" in states(slurm)

    alongside(lambda: wait_until(submitted), lambda: ask(run.workspace, RUN, RunRequest.cancel))
    with begin_run.fn(run) as makers, pytest.raises(RunCancelled):
        makers.make("letters")
    assert set(states(slurm)) <= {"CANCELLED", "FAILED"} and read_order(run.workspace, RUN) is None
    withdraw(run.workspace, RUN)

    def interrupted() -> list[int]:
        if submitted():
            raise KeyboardInterrupt
        return list(range(5))

    with pytest.raises(KeyboardInterrupt), begin_run.fn(run) as makers:
        monkeypatch.setattr(run.parts["letters"], "missing", interrupted)
        makers.make("letters")
    wait_until(lambda: set(states(slurm)) <= {"CANCELLED", "FAILED"})


def test_tasks_of_a_coordinator_that_died_are_taken_over(tmp_path: Path, letters: Letters, slurm: Path) -> None:
    run = queued(tmp_path, tasks=1, slurm={**AT_ONCE, "setup": ["sleep 60 & wait"]})
    name = job_arrays.job_name(run.workspace, RUN)
    config = run.config.execution.slurm
    slurm_commands.submit(written_script(tmp_path / "old", name, config, str(run.workspace.root), RUN), 1, None)
    cancel = lambda: ask(run.workspace, RUN, RunRequest.cancel)  # noqa: E731
    alongside(lambda: wait_until(lambda: read_queue(run.workspace, RUN)), lambda: time.sleep(0.7), cancel)
    with begin_run.fn(run) as makers, pytest.raises(RunCancelled):
        makers.make("letters")
    assert list(local_slurm.queue(slurm)) == ["1_0"]


def test_the_script_says_what_the_configuration_says(tmp_path: Path) -> None:
    config = SlurmConfig.model_validate(
        {
            **{"partition": "gpu", "gres": "gpu:a100:1", "time": "1-12", "account": "lab", "sbatch": ["--mem=32G"]},
            **{"setup": ["module load cuda", ". venv/bin/activate"], "python": "apptainer exec --nv f.sif python"},
        }
    )
    script = written_script(tmp_path / "50% of it", "fastgda-run", config, "/data/my workspace", "run")
    assert script.read_text().splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=fastgda-run",
        f"#SBATCH --output={tmp_path}/50%% of it/%A_%a.log",
        "#SBATCH --signal=B:TERM@90",
        "#SBATCH --partition=gpu",
        "#SBATCH --gres=gpu:a100:1",
        "#SBATCH --time=1-12",
        "#SBATCH --account=lab",
        "#SBATCH --mem=32G",
        "module load cuda",
        ". venv/bin/activate",
        "exec apptainer exec --nv f.sif python -m tasks.execution.array_task '/data/my workspace' run",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"), [("5", 300), ("1:30", 90), ("2:00:00", 7200), ("2-0", 172800), ("1-12:30", 131400)]
)
def test_a_time_limit_is_read_as_slurm_reads_it(text: str, seconds: int) -> None:
    assert SlurmConfig(time=text).time_seconds == seconds


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"slurm": {"sbatch": ["constraint=a100"]}}, "is no option"),
        ({"slurm": {"sbatch": ["--array=0-9"]}}, "--array is set by the run itself"),
        ({"slurm": {"sbatch": ["--time=60"]}}, "set execution.slurm.time"),
        ({"slurm": {"setup": ["module load a\nrm b"]}}, "is not one line"),
        ({"slurm": {"tasks": 2, "at_once": 3}}, "more than tasks, 2"),
        ({"slurm": {"time": "two hours"}}, "time"),
        ({"workers": 2}, "of runner slurm, set slurm.tasks"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ExecutionConfig.model_validate({"runner": "slurm", **changes})


def test_a_machine_without_slurm_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"sbatch, squeue, scancel not found on this machine: start .* a login node"):
        require_runner("slurm")
