"""Which task runner makes the parts."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from fastgda_core.errors import UsageError
from tasks.config.pipeline import PipelineConfig
from tasks.execution import runners
from tasks.execution.runners import submission, task_runner
from tests.tasks.configs import document


def configured(**execution: object) -> PipelineConfig:
    return PipelineConfig.model_validate(document(execution=execution))


def test_one_device_is_a_thread_of_this_process_and_several_are_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(task_runner(configured()), ThreadPoolTaskRunner)
    two = task_runner(configured(workers=2))
    assert isinstance(two, ProcessPoolTaskRunner)
    monkeypatch.setattr(runners.torch.cuda, "device_count", lambda: 4)
    on_gpus = task_runner(PipelineConfig.model_validate(document(device="cuda")))
    assert isinstance(on_gpus, ProcessPoolTaskRunner) and on_gpus._max_workers == 4
    assert isinstance(task_runner(configured()), ThreadPoolTaskRunner), "the configuration says cpu"


@pytest.mark.heavy
def test_a_cluster_is_the_one_that_is_named_or_one_of_this_machines_own() -> None:
    ray_there, dask_there = (
        task_runner(configured(runner=name, address=address))
        for name, address in (("ray", "ray://head:10001"), ("dask", "tcp://head:8786"))
    )
    assert ray_there.address == "ray://head:10001" and dask_there.address == "tcp://head:8786"
    own = task_runner(configured(runner="ray", workers=3))
    assert own.address is None and own.init_kwargs["num_cpus"] == 3 and "num_gpus" not in own.init_kwargs
    assert task_runner(configured(runner="dask", workers=3)).cluster_kwargs["n_workers"] == 3


@pytest.mark.parametrize("name", ["ray", "dask"])
def test_a_runner_that_is_not_installed_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, f"prefect_{name}", None)
    with pytest.raises(UsageError, match=rf"execution.runner is {name}.*pip install 'fastgda\[{name}\]'"):
        task_runner(configured(runner=name))


def test_parts_ask_for_no_gpu_outside_of_a_ray_cluster_with_some() -> None:
    assert isinstance(submission(configured()), nullcontext)
    assert isinstance(submission(configured(runner="ray")), nullcontext), "on the CPU"
