"""Read a configuration file, and change its runner."""

from __future__ import annotations

import glob
from pathlib import Path

from pydantic import (
    ValidationError,
)

from fastgda_core.errors import UsageError
from tasks.config.document import read_document, workspace_from
from tasks.config.execution import ExecutionConfig
from tasks.config.faults import faults
from tasks.config.inputs import DataConfig
from tasks.config.pipeline import PipelineConfig


def load_config(path: Path) -> PipelineConfig:
    """Read a YAML config; paths in it are made absolute, seen from its own folder.

    Raises:
        UsageError: the file is unreadable, or a field unknown, missing or out of range; one line per fault.
    """
    try:
        config = PipelineConfig.model_validate(read_document(path))
    except ValidationError as error:
        raise UsageError("\n".join(f"{path}: {fault}" for fault in faults(error, PipelineConfig))) from None
    folder = path.resolve().parent
    literal = Path(glob.escape(str(folder)))  # only what the config itself says is a pattern
    return config.model_copy(
        update={
            "workspace": workspace_from(path, config.workspace),
            "data": DataConfig(shards=str(literal / config.data.shards)),
            "model": config.model.seen_from(folder),
            "teacher": config.teacher.model_copy(
                update={"checkpoints": tuple(folder / each for each in config.teacher.checkpoints)}
            ),
            "features": config.features.seen_from(folder),
            "candidates": config.candidates.seen_from(folder),
            "judge": config.judge.seen_from(folder) if config.judge else None,
            "queries": config.queries.model_copy(
                update={"shards": str(literal / config.queries.shards) if config.queries.shards else None}
            ),
        }
    )


def with_runner(config: PipelineConfig, runner: str) -> PipelineConfig:
    """Return the configuration with another runner, which makes its parts elsewhere.

    Raises:
        UsageError: the other settings of `execution` do not fit.
    """
    try:
        execution = ExecutionConfig.model_validate({**config.execution.model_dump(), "runner": runner})
    except ValidationError as error:
        lines = [fault.removeprefix("config: ") for fault in faults(error, ExecutionConfig)]
        raise UsageError("\n".join(f"--runner {runner}: execution: {line}" for line in lines)) from None
    return config.model_copy(update={"execution": execution})
