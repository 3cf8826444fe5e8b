"""How parts are tried again, sized into jobs, given up and named."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, date, datetime
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from fastgda_core.errors import BadSample, Remedy, Stopped, TransientError, UsageError, remedy
from fastgda_core.interruption import checked_by, checkpoint
from fastgda_core.teachers.micro_batch import MicroBatch
from storage_schemas.runs.attempts import AttemptLog, ShardState, deaths, read_attempts
from storage_schemas.runs.liveness import Beat, RunRequest, ask, asked, read_beats, withdraw, write_beat
from storage_schemas.workspace import Workspace
from tasks.config.execution import ExecutionConfig, PoolConfig
from tasks.config.files import load_config
from tasks.config.inputs import QueriesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.execution.fan_out import WorkOrder, quarantine_deadly
from tasks.execution.jobs import JobPool
from tasks.execution.number_ranges import as_ranges, from_ranges
from tasks.execution.partitions import in_partition, partition_names
from tasks.execution.worker import Worker
from tasks.teaching.cost import Size
from tasks.teaching.families import family_of
from tests.storage_schemas.workspaces import plan_run
from tests.tasks.configs import document
from tests.tasks.execution.claims import claim


@given(st.sets(st.integers(0, 10_000)))
def test_numbers_survive_as_ranges(numbers: set[int]) -> None:
    assert from_ranges(as_ranges(numbers)) == sorted(numbers)


@pytest.mark.parametrize("text", ["a", "1-b", "1,,x", "-3", "0-2 5", "1.5", "5-2", ",", "3,", "4-", " "])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write them as 0-2,5"):
        from_ranges(text)


class EndpointConnectionError(Exception):
    """Named as botocore's, which need not be installed."""


class ClientError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """Of gcsfs (`code`), google.api_core (`code`, an HTTPStatus), azure.core (`status_code`), aiohttp (`status`)."""

    def __init__(self, **status: object) -> None:
        super().__init__(str(status))
        vars(self).update(status)


def _raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Remedy.smaller),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Remedy.smaller),
        (BadSample("torn"), Remedy.quarantine),
        (TransientError("later"), Remedy.retry),
        (ConnectionResetError(104, "reset"), Remedy.retry),
        (TimeoutError(), Remedy.retry),
        (OSError(errno.ESTALE, "stale NFS handle"), Remedy.retry),
        (EndpointConnectionError("no route"), Remedy.retry),
        (ClientError(503), Remedy.retry),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Remedy.retry),
        (_raised_from(ValueError("cannot read"), ConnectionResetError()), Remedy.retry),
        (HttpError(code=503), Remedy.retry),
        (HttpError(code=HTTPStatus.TOO_MANY_REQUESTS), Remedy.retry),
        (HttpError(status_code=500), Remedy.retry),
        (HttpError(status=429, message="slow down"), Remedy.retry),
        (HttpError(response=SimpleNamespace(status_code=502)), Remedy.retry),
        (httpx.ConnectTimeout("no answer"), Remedy.retry),
        (httpx.RemoteProtocolError("closed without an answer"), Remedy.retry),
        (httpx.UnsupportedProtocol("htp://"), Remedy.stop),
        (HttpError(code=404), Remedy.stop),
        (HttpError(status_code=403), Remedy.stop),
        (HttpError(code="E500", status="gone"), Remedy.stop),
        (ClientError(403), Remedy.stop),
        (OSError(errno.ENOSPC, "disk full"), Remedy.stop),
        (FileNotFoundError("gone"), Remedy.stop),
        (UsageError("alpha"), Remedy.stop),
        (_raised_from(UsageError("model.folder does not load"), BrokenPipeError(errno.EPIPE, "pipe")), Remedy.retry),
        (KeyError("bug"), Remedy.stop),
    ],
    ids=repr,
)
def test_errors_are_told_apart_by_what_to_do(error: Exception, expected: Remedy) -> None:
    assert remedy(error) is expected


def test_work_stops_between_two_micro_batches_and_not_within_one() -> None:
    seen: list[slice] = []
    calls = iter([None, None, Stopped])

    def check() -> None:
        if (what := next(calls)) is not None:
            raise what

    with pytest.raises(Stopped), checked_by(check):
        for stretch, _ in MicroBatch(2).run(10, lambda stretch: stretch):
            seen.append(stretch)
    assert seen == [slice(0, 2), slice(2, 4)]
    checkpoint()  # outside of the block nobody is asked


@pytest.mark.integration
def test_each_process_has_a_device_of_its_own_and_gives_it_back_when_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    claimed, after, leave = context.Queue(), context.Queue(), context.Event()
    workers = [context.Process(target=claim, args=(2, claimed, leave)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [claimed.get(timeout=60) for _ in workers]
    assert sorted(each for each in found if isinstance(each, int)) == [0, 1]
    assert sum("all 2 GPUs" in str(each) for each in found) == 1
    for worker in workers:
        worker.kill()
        worker.join()
    # In a queue of its own: a killed process may still hold the lock of the other one.
    later = context.Process(target=claim, args=(2, after, leave))
    later.start()
    assert after.get(timeout=60) == 0
    later.kill()
    later.join()


def test_a_shard_over_which_workers_die_is_quarantined_until_it_is_released(tmp_path: Path) -> None:
    plan_run(tmp_path, "run")
    workspace = Workspace(tmp_path)
    for number in range(2):  # two processes that never came back, and one whose failure was its own
        AttemptLog(workspace, "run", worker=f"host:{number}").record(1, ShardState.running)
    log = AttemptLog(workspace, "run", worker="host:3")
    with pytest.raises(KeyError), log.attempt(1, "cpu"):
        raise KeyError
    with pytest.raises(KeyboardInterrupt), log.attempt(2, "cpu"):
        raise KeyboardInterrupt
    attempts = read_attempts(workspace, "run")
    assert deaths(attempts[1]) == 2
    assert attempts.get(2, []) == [], "one that was left because somebody asked is not held against the shard"
    assert quarantine_deadly(workspace, "run", "scores", [1, 2], max_deaths=3) == {}
    failures = quarantine_deadly(workspace, "run", "scores", [1, 2], max_deaths=2)
    assert failures.keys() == {1} and "2 worker processes died" in str(failures[1])
    assert read_attempts(workspace, "run")[1][-1].state == ShardState.quarantined
    log.record(1, ShardState.pending)
    assert read_attempts(workspace, "run")[1] == []


def job_pool(tmp_path: Path, seconds: float | None, **execution: object) -> JobPool:
    order = WorkOrder("here", "run", "key", "scores", ExecutionConfig.model_validate({"runner": "pool", **execution}))
    return JobPool(Workspace(tmp_path), order, lambda: seconds, list)


def test_jobs_are_as_long_as_others_can_wait_and_shorter_towards_the_end(tmp_path: Path) -> None:
    two = ({"deployment": "make parts/h100", "slots": 2}, {"deployment": "make parts/a10", "slots": 2, "speed": 0.5})
    jobs = job_pool(tmp_path, 30.0, job_minutes=10, pools=two)
    fast, slow = jobs.order.execution.pools
    assert jobs._size(fast, 1000) == 20, "ten minutes of thirty seconds"
    assert jobs._size(slow, 1000) == 10
    assert jobs._size(fast, 40) == 5, "a part of what is left, so that all end at once"
    assert jobs._size(fast, 4) == 2, "but a minute of work at least"
    assert job_pool(tmp_path, None)._size(PoolConfig(), 1000) == 4, "the first show what a part takes"


def test_the_time_limit_follows_from_what_a_part_is_known_to_take() -> None:
    order = WorkOrder("here", "run", "key", "scores", ExecutionConfig(timeout_factor=10, timeout_floor=300))
    assert order.timeout(None) is None
    assert order.timeout(1.0) == 300
    assert order.timeout(100.0) == 1000


def test_a_wish_and_signs_of_life_are_seen_by_whoever_looks(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert asked(workspace, "run") is None and read_beats(workspace, "run") == []
    ask(workspace, "run", RunRequest.pause)
    assert asked(workspace, "run") == RunRequest.pause
    withdraw(workspace, "run")
    assert asked(workspace, "run") is None

    beat = Beat(worker="host:1", beat=3, at=datetime.now(UTC), kind="scores", number=7)
    write_beat(workspace, "run", beat)
    (workspace.root / "runs" / "run" / "workers" / "torn.json").write_text("{")
    assert read_beats(workspace, "run") == [beat]


def test_forward_passes_are_those_of_the_formula() -> None:
    def of(**changes: object) -> dict[str, float]:
        config = PipelineConfig.model_validate(document(**changes))
        size = Size(samples=100, captions=2.0, queries=10, candidates=100)
        return {cost.kind: cost.forwards for cost in family_of(config).costs(config, size)}

    exact = of(teacher__name="abu_plus", teacher__timesteps=5, teacher__draws=3, teacher__gradient_pairs=7)
    assert exact["base losses"] == 100 * 5 * 3 * 2
    assert exact["scores"] == 10 * 100 * 5 * 3 * 2
    assert exact["unlearning steps"] == pytest.approx(10 * 7 * 2.1)
    first_order = of(teacher__name="abu_plus_first_order", teacher__timesteps=5)
    assert first_order["scores"] == pytest.approx(100 * 5 * 2 * 2.1), "one pass serves all queries"
    assert "base losses" not in first_order


def test_partitions_of_a_range_of_dates() -> None:

    assert partition_names(date(2026, 2, 27), date(2026, 3, 1), None) == ["2026-02-27", "2026-02-28", "2026-03-01"]
    assert partition_names(date(2026, 2, 27), None, None) == ["2026-02-27"]
    for wrong in ((None, None, None), (date(2026, 1, 1), None, ["a"]), (date(2026, 1, 2), date(2026, 1, 1), None)):
        with pytest.raises(UsageError):
            partition_names(*wrong)


def test_a_configuration_in_a_partition_adds_to_what_is_published() -> None:
    config = PipelineConfig.model_validate(
        document(queries={"shards": "g/{partition}/*.tar", "split": {"validation_share": 0.1, "test_share": 0.1}})
    )
    there = in_partition(config, "2026-11-23")
    assert there.queries.partition == "2026-11-23" and there.publish == "add"
    with pytest.raises(UsageError, match=r"no \{partition\}"):
        in_partition(PipelineConfig.model_validate(document()), "2026-11-23")


@given(st.integers(3, 500), st.floats(0.01, 0.49), st.floats(0.01, 0.49))
@example(4, 0.375, 0.375)  # half a query is rounded up twice
def test_shares_of_a_split_add_up(queries: int, validation: float, test: float) -> None:
    config = QueriesConfig.model_validate(
        {"shards": "x.tar", "split": {"validation_share": validation, "test_share": test}}
    )
    split = config.split.of(queries)
    assert split.total == queries and min(split.train, split.validation, split.test) >= 1


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"execution": {"runer": "ray"}}, "execution.runer: no such field"),
        (
            {"execution": {"runner": "pbs"}},
            "execution.runner: Input should be 'local', 'ray', 'dask', 'pool' or 'slurm'",
        ),
        ({"execution": {"retries": -1}}, "execution.retries: Input should be greater than or equal to 0"),
        ({"execution": {"window": 0}}, "execution.window"),
        ({"execution": {"address": "ray://x:1"}}, "execution: address belongs to runners ray and dask"),
        ({"execution": {"runner": "pool", "workers": 2}}, "execution: workers belongs to"),
        ({"execution": {"runner": "pool", "pools": []}}, "execution: pools is empty"),
        ({"execution": {"pools": [{"deployment": "nothing"}]}}, "execution.pools.0.deployment"),
        ({"teacher__name": "datamodels"}, "teacher.name: there is no teacher 'datamodels': choose one of abu"),
        ({"teacher__gradient_pairs": -5}, "teacher.gradient_pairs"),
        ({"queries__partition": "2026-11-23"}, "queries: partition is given but shards has no {partition}"),
        ({"queries__split": {"validation_share": 0.6, "test_share": 0.5}}, "queries.split: validation_share and"),
        ({"queries__split": {"train": 1, "test": 1}}, "queries.split.validation: is missing"),
        ({"evaluation__floor": 2}, "evaluation.floor"),
        ({"publish": "both"}, "publish: Input should be 'alone', 'add' or 'never'"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_in_one_line(tmp_path: Path, changes: dict[str, object], fragment: str) -> None:

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document(**changes)))
    with pytest.raises(UsageError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    (line,) = lines
    assert fragment in line, line


def test_a_process_whose_disk_is_gone_ends_without_another_error(tmp_path: Path) -> None:
    worker = Worker(Workspace.at(tmp_path), "run")
    while not read_beats(worker.workspace, "run"):
        time.sleep(0.05)
    worker.leave()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").write_text("nothing can be written here any more")
    worker.end()


@pytest.mark.integration
@pytest.mark.parametrize("asked", ["0", "1"])
def test_whether_the_hub_is_asked_is_the_users_choice(asked: str) -> None:
    code = "import os, flows; print(os.environ['HF_HUB_OFFLINE'])"
    environment = {**os.environ, "HF_HUB_OFFLINE": asked, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == asked
