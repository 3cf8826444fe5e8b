"""What every task of a run shares: where things lie, which device, the loaded model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgda_core.diffusion.model import DiffusionModel, load_model
from fastgda_core.errors import UsageError
from storage_schemas.commit import committed
from storage_schemas.workspace import Workspace
from tasks.config import PipelineConfig


@dataclass(frozen=True)
class Stage:
    """What a task made: key of its content, where it lies, rows, seconds of work, whether it was there before."""

    name: str
    key: str
    path: Path
    rows: int
    seconds: float
    reused: bool


def stage_of_parts(name: str, key: str, folder: Path, paths: list[Path], rows: int, *, reused: bool) -> Stage:
    """The stage that some committed files make up; its seconds are theirs together."""
    manifests = [committed(path, key) for path in paths]
    return Stage(name, key, folder, rows, sum(manifest.seconds for manifest in manifests if manifest), reused)


@dataclass(frozen=True)
class Context:
    config: PipelineConfig
    model_hash: str

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.config.workspace)

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.device)

    def model(self) -> DiffusionModel:
        """The model, loaded once per process."""
        return _load_model(self.config.model.folder, self.model_hash, self.device)


@functools.lru_cache(maxsize=1)
def _load_model(folder: Path, _model_hash: str, device: torch.device) -> DiffusionModel:
    return load_model(folder, device)


def pick_device(name: str) -> torch.device:
    """Raises UsageError when CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError('device is "cuda" but torch sees no GPU: install a CUDA build of torch or set device: auto')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
