"""Packages that a configuration needs by what it chooses; an extra of this project brings each."""

from __future__ import annotations

from fastgda_core.extras import require_extra
from fastgda_core.feature_spaces import require_encoders
from tasks.config.pipeline import PipelineConfig

RUNNERS = {"ray": ("prefect_ray", "ray"), "dask": ("prefect_dask", "distributed")}


def require_packages(config: PipelineConfig) -> None:
    """Check that a configuration's packages are installed, before hours are spent on the stages that come first.

    Raises:
        UsageError: a package is missing.
    """
    require_runner(config.execution.runner)
    require_encoders(config.features.space, "features.space")
    require_encoders(config.candidates.space or config.features.space, "candidates.space")
    for name, rival in (config.judge.rivals if config.judge else {}).items():
        if rival.space is not None:
            require_encoders(rival.space, f"judge.rivals.{name}.space")


def require_runner(runner: str) -> None:
    """Check that the packages of a task runner are installed.

    Raises:
        UsageError: a package is missing.
    """
    if runner in RUNNERS:
        require_extra(runner, *RUNNERS[runner], wanted_by=f"execution.runner is {runner}")
