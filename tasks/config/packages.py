"""Packages that a configuration needs by what it chooses; an extra of this project brings each."""

from __future__ import annotations

import shutil

from fastgda_core.errors import UsageError
from fastgda_core.extras import require_extra
from fastgda_core.feature_spaces import require_encoders
from tasks.config.pipeline import PipelineConfig

RUNNERS = {"ray": ("prefect_ray", "ray"), "dask": ("prefect_dask", "distributed")}
COMMANDS = ("sbatch", "squeue", "scancel")  # of Slurm, without which no task is submitted or watched


def require_packages(config: PipelineConfig) -> None:
    """Check that a configuration's packages are installed, before hours are spent on the stages that come first.

    Raises:
        UsageError: a package is missing.
    """
    require_runner(config.execution.runner)
    if config.execution.openlineage is not None:
        require_extra("lineage", "openlineage", wanted_by="execution.openlineage")
    require_encoders(config.features.space, "features.space")
    require_encoders(config.candidates.space or config.features.space, "candidates.space")
    for name, rival in (config.judge.rivals if config.judge else {}).items():
        if rival.space is not None:
            require_encoders(rival.space, f"judge.rivals.{name}.space")


def require_runner(runner: str) -> None:
    """Check that the packages of a task runner are installed, or, for Slurm, its commands.

    Raises:
        UsageError: a package or a command is missing.
    """
    missing = [command for command in COMMANDS if shutil.which(command) is None] if runner == "slurm" else []
    if missing:
        raise UsageError(
            f"execution.runner is slurm: {', '.join(missing)} not found on this machine: start the run on a login node "
            "of the cluster"
        )
    if runner in RUNNERS:
        require_extra(runner, *RUNNERS[runner], wanted_by=f"execution.runner is {runner}")
