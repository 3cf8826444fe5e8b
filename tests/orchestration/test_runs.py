"""Runs that fail, pause, stop and go on, through the real command on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands import own_server
from storage_schemas.commit import read_manifest
from storage_schemas.runs.ledger import run_names
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.flows.pipeline_case import QUERIES, SAMPLES, environment, fastgda, lay_out
from tests.orchestration.chaos_case import FAULTS
from tests.prefect_processes import ROOT, free_port

SHARDS = 15  # of four samples


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, home: Path) -> Path:
    """A folder whose curation was left alone, in this machine's one process."""
    folder = tmp_path_factory.mktemp("calm")
    fastgda("curate", small(folder, model_folder), home=home)
    return folder


def small(folder: Path, model: Path, **execution: Any) -> Path:
    return lay_out(
        folder,
        model,
        teacher__shard_samples=4,
        features={"space": "pixel"},
        queries__twins=0,
        exact_check=None,
        execution={"retry_delay": 0.05, **execution},
    )


def with_faults(folder: Path, **faults: Any) -> dict[str, str]:
    """Environment of a process in which these faults happen."""
    folder.mkdir(exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(faults))
    return {"FAULTS": str(folder), "PYTHONPATH": f"{FAULTS}:{ROOT}"}


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("workspace/scores/*/part-*.parquet"))}


def the_run(folder: Path) -> str:
    (run,) = run_names(Workspace(folder / "workspace"))
    return run


def status(folder: Path, home: Path) -> dict[str, Any]:
    done = fastgda("status", "--json", "--workspace", folder / "workspace", home=home)
    return json.loads(done.stdout)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert time.monotonic() < deadline, "it never came"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)


def slow_curation(folder: Path, model: Path, home: Path) -> subprocess.Popen[str]:
    """A curation that takes its time, with its first shards done."""
    slow = with_faults(folder / "faults", slow=1.0, slow_seconds=0.5)
    command = [str(Path(sys.executable).with_name("fastgda")), "curate", str(small(folder, model))]
    process = subprocess.Popen(
        command, env={**environment(home), **slow}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(shard_files(folder)) >= 3, process)
    return process


def test_a_second_execution_makes_nothing(calm: Path, home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (calm / "workspace").rglob("*.manifest.json")}
    done = fastgda("curate", calm / "config.yaml", home=home)
    assert " new " not in done.stdout and "reused" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (calm / "workspace").rglob("*.manifest.json")}


def test_two_that_train_the_same_head_at_once_train_it_once(calm: Path, home: Path) -> None:
    command = [str(Path(sys.executable).with_name("fastgda")), "train", str(calm / "config.yaml")]
    trainers = [
        subprocess.Popen(command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [trainer.communicate() for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [0, 0], told
    assert sorted("(was there)" in output for output, _ in told) == [False, True]
    assert sum("makes it already; waiting for it" in errors for _, errors in told) == 1


def test_without_a_server_a_command_has_its_own_which_ends_with_it(calm: Path, tmp_path: Path) -> None:
    nothing = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    command = [str(Path(sys.executable).with_name("fastgda")), "curate", str(calm / "config.yaml")]
    marked = {**nothing, "PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command, env=marked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def servers() -> int:
        found = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ, arguments = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            found += str(tmp_path).encode() in environ and b"create_app" in arguments
        return found

    wait_for(lambda: servers() == 1, process)
    process.kill()
    process.wait()
    wait_for(lambda: servers() == 0)
    subprocess.run(command, env=marked, check=True, capture_output=True)
    assert servers() == 0


def test_a_server_whose_command_died_before_it_began_ends_at_once(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    server = ("--factory", "prefect.server.api.server:create_app", "--port", str(free_port()))
    folder = tmp_path / "database"
    folder.mkdir()
    started = [sys.executable, "-c", own_server._SERVER, died.stdout, str(folder), *server]
    subprocess.run(started, check=True, timeout=60)
    assert not folder.exists()


@pytest.mark.parametrize(
    "execution",
    [
        {"runner": "ray", "workers": 2},
        pytest.param({"runner": "local", "workers": 2}, marks=pytest.mark.slow),
        pytest.param({"runner": "dask", "workers": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_runners_write_the_same_shards(
    calm: Path, tmp_path: Path, model_folder: Path, home: Path, execution: dict[str, Any]
) -> None:
    fastgda("curate", small(tmp_path, model_folder, **execution), home=home, extra={})
    assert len(shard_files(calm)) == SHARDS
    if execution["runner"] == "dask":
        # Each of its processes has one thread and not two, which rounds otherwise in the last digits.
        found, expected = (
            query(folder / "workspace", "SELECT * FROM scores ORDER BY query_id, train_id")
            for folder in (tmp_path, calm)
        )
        assert found.drop_columns("score").equals(expected.drop_columns("score"))
        assert found["score"].to_pylist() == pytest.approx(expected["score"].to_pylist(), rel=1e-3, abs=1e-9)
    else:
        assert shard_files(tmp_path) == shard_files(calm)
    assert the_run(tmp_path) == the_run(calm)
    coordinator = read_manifest(next((tmp_path / "workspace").glob("samples/*/samples.parquet")))
    workers = {row["worker"] for row in query(tmp_path / "workspace", "SELECT DISTINCT worker FROM shards").to_pylist()}
    assert coordinator is not None and workers and coordinator.worker not in workers, "other processes made the shards"


def test_a_paused_run_stops_within_a_micro_batch_and_goes_on_when_it_is_resumed(
    calm: Path, tmp_path: Path, model_folder: Path, home: Path
) -> None:
    process = slow_curation(tmp_path, model_folder, home)
    workspace = tmp_path / "workspace"
    fastgda("pause", the_run(tmp_path), "--workspace", workspace, home=home)
    time.sleep(2.5)
    at_rest = shard_files(tmp_path)
    assert status(tmp_path, home)["state"] == "paused"
    time.sleep(2)
    assert shard_files(tmp_path) == at_rest and len(at_rest) < SHARDS
    assert process.poll() is None
    fastgda("resume", the_run(tmp_path), "--workspace", workspace, home=home)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    assert shard_files(tmp_path) == shard_files(calm)


def test_a_cancelled_run_keeps_what_is_finished_and_retry_goes_on(
    calm: Path, tmp_path: Path, model_folder: Path, home: Path
) -> None:
    process = slow_curation(tmp_path, model_folder, home)
    run, workspace = the_run(tmp_path), tmp_path / "workspace"
    fastgda("cancel", run, "--workspace", workspace, home=home)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was cancelled" in errors and f"fastgda retry {run}" in errors.replace("\n", " ")
    kept = shard_files(tmp_path)
    assert 3 <= len(kept) < SHARDS
    assert status(tmp_path, home)["state"] == "cancelled"
    with pytest.raises(NotPublished):
        read_published(Workspace(workspace))
    fastgda("retry", run, "--workspace", workspace, home=home)
    assert shard_files(tmp_path) == shard_files(calm)


@pytest.mark.slow  # with parts of a test's own: tests/tasks/execution/test_coordinator.py
def test_a_shard_that_kills_its_workers_is_quarantined_and_its_neighbours_are_done(
    calm: Path, tmp_path: Path, model_folder: Path, home: Path
) -> None:
    deadly = with_faults(tmp_path / "faults", deadly=1)
    config = small(tmp_path, model_folder, workers=2, max_deaths=1)
    done = fastgda("curate", config, home=home, check=False, extra=deadly)
    assert done.returncode == 1, done.stderr
    run = the_run(tmp_path)
    assert f"run {run}: 1 of {SHARDS} parts of 'scores' failed" in done.stderr
    assert "scores 00000: WorkerLost: 2 worker processes died while they made it" in done.stderr
    found = status(tmp_path, home)
    assert found["state"] == "incomplete"
    assert found["shards"]["quarantined"] == 1 and found["shards"]["done"] == SHARDS - 1
    assert [failure["shard"] for failure in found["failures"]] == [0]
    again = fastgda("curate", config, home=home, check=False)
    assert again.returncode == 1 and "WorkerLost" in again.stderr, "it is not tried again by itself"
    fastgda("retry", run, "--shard", "0", "--workspace", tmp_path / "workspace", home=home)
    assert shard_files(tmp_path) == shard_files(calm)


def test_a_failure_that_passes_is_retried_with_backoff(
    calm: Path, tmp_path: Path, model_folder: Path, home: Path
) -> None:
    broken = with_faults(tmp_path / "faults", connection=0.3)
    fastgda("curate", small(tmp_path, model_folder, retries=20), home=home, extra=broken)
    assert shard_files(tmp_path) == shard_files(calm)
    failed = status(tmp_path, home)["failed_attempts"]
    assert failed.keys() == {"ConnectionResetError"} and failed["ConnectionResetError"] >= 1


def test_a_sample_whose_loss_is_no_number_is_named_and_the_rest_goes_on(
    calm: Path, tmp_path: Path, model_folder: Path, home: Path
) -> None:
    fastgda("curate", small(tmp_path, model_folder), home=home, extra=with_faults(tmp_path / "faults", nan=21))
    workspace = tmp_path / "workspace"
    counted = query(workspace, "SELECT count(*) AS n, count(*) FILTER (train_id = 21) AS bad FROM scores").to_pylist()
    assert counted == [{"n": QUERIES * (SAMPLES - 1), "bad": 0}]
    (left_out,) = status(tmp_path, home)["left_out"]
    assert left_out["train_id"] == 21 and left_out["found_in"] == "scores" and "is nan" in left_out["reason"]
    fastgda("retry", the_run(tmp_path), "--workspace", workspace, home=home)
    assert shard_files(tmp_path) == shard_files(calm)
    assert query(workspace, "SELECT count(*) AS n FROM scores").to_pylist() == [{"n": QUERIES * SAMPLES}]
    assert status(tmp_path, home)["left_out"] == []
