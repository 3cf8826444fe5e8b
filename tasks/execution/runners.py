"""The Prefect task runner that makes a run's parts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from fastgda_core.interruption import stop_on_interrupt
from tasks.config.packages import require_runner
from tasks.config.pipeline import PipelineConfig


def task_runner(config: PipelineConfig) -> TaskRunner[Any]:
    """Build the configured task runner.

    By default it has one process per GPU. On a CPU, or with one GPU, it is a thread of this process, with all cores.

    Raises:
        UsageError: the package of the runner is not installed.
    """
    execution = config.execution
    require_runner(execution.runner)
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    workers = execution.workers or max(1, gpus)
    if execution.runner == "ray":
        return _ray(execution.address, workers, gpus)
    if execution.runner == "dask":
        return _dask(execution.address, workers)
    if workers == 1:
        return ThreadPoolTaskRunner(max_workers=1)
    return ProcessPoolTaskRunner(max_workers=workers, initializer=stop_on_interrupt)


def submission(config: PipelineConfig) -> AbstractContextManager[object]:
    """Return a context for handing parts to the task runner: in a Ray cluster with GPUs, each part takes one."""
    if config.execution.runner != "ray" or config.device == "cpu":
        return nullcontext()
    import ray
    from prefect_ray.context import remote_options

    gpus = config.device == "cuda" or ray.cluster_resources().get("GPU", 0) > 0
    return remote_options(num_gpus=1) if gpus else nullcontext()


def _ray(address: str | None, workers: int, gpus: int) -> TaskRunner[Any]:
    from prefect_ray import RayTaskRunner

    if address is not None:
        return RayTaskRunner(address=address)
    # A cluster of this machine's own, with room for `workers` tasks at a time.
    options = {"num_cpus": workers, "include_dashboard": False, "configure_logging": False, "log_to_driver": False}
    return RayTaskRunner(init_kwargs=options | ({"num_gpus": gpus} if gpus else {}))


def _dask(address: str | None, workers: int) -> TaskRunner[Any]:
    from prefect_dask.task_runners import DaskTaskRunner

    if address is not None:
        return DaskTaskRunner(address=address)
    options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=options)
