"""What every task of a run shares: where things lie, which device, the loaded model."""

from __future__ import annotations

import fcntl
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file

from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.model import DiffusionModel, load_model
from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.teachers.micro_batch import MicroBatch
from storage_schemas.commit import committed
from storage_schemas.files import AnyPath, private_folder
from storage_schemas.workspace import Workspace
from tasks.config import PipelineConfig


@dataclass(frozen=True)
class Stage:
    """What a task made: key of its content, where it lies, rows, seconds of work, whether it was there before."""

    name: str
    key: str
    path: AnyPath
    rows: int
    seconds: float
    reused: bool


def stage_of_parts(name: str, key: str, folder: AnyPath, paths: list[AnyPath], rows: int, *, reused: bool) -> Stage:
    """The stage that some committed files make up; its seconds are theirs together."""
    manifests = [committed(path, key) for path in paths]
    return Stage(name, key, folder, rows, sum(manifest.seconds for manifest in manifests if manifest), reused)


@dataclass(frozen=True)
class Context:
    config: PipelineConfig
    model_hash: str

    @property
    def workspace(self) -> Workspace:
        return _workspace(self.config.workspace)

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.device)

    def model(self) -> DiffusionModel:
        """The model, loaded once per process."""
        return _load_model(self.config.model.folder, self.model_hash, self.device)

    def teacher_model(self, precision: Precision | None = None) -> DiffusionModel:
        """The model as the teacher runs it."""
        config = self.config
        precision = precision or config.teacher.precision
        model = _teacher_model(config.model.folder, self.model_hash, self.device, precision, config.model.compile)
        return model.with_objective(config.teacher.objective)

    def layers(self, model: DiffusionModel) -> dict[str, Layer]:
        """Those whose weights the unlearning step moves."""
        return select_layers(model.denoiser, self.config.teacher.layers)

    def micro_batch(self, purpose: str) -> MicroBatch:
        """Forwards at a time: one size per process and kind of work, so that what once ran out of memory is not tried
        again."""
        teacher = self.config.teacher
        return _micro_batch(
            self.config.model.micro_batch, self.model_hash, self.device, purpose, teacher.layers, teacher.precision
        )


_workspace = functools.lru_cache(maxsize=8)(Workspace.at)


def load_tensors(path: AnyPath) -> dict[str, torch.Tensor]:
    """A safetensors file, on disk or in an object store."""
    return load_file(path) if isinstance(path, Path) else load_bytes(path.read_bytes())


@functools.lru_cache(maxsize=1)
def _load_model(folder: Path, _model_hash: str, device: torch.device) -> DiffusionModel:
    return load_model(folder, device)


@functools.lru_cache(maxsize=2)
def _teacher_model(
    folder: Path, model_hash: str, device: torch.device, precision: Precision, compiled: bool
) -> DiffusionModel:
    model = _load_model(folder, model_hash, device).in_precision(precision)
    return model.compiled() if compiled else model


@functools.lru_cache(maxsize=32)
def _micro_batch(size: int, *_where: object) -> MicroBatch:
    return MicroBatch(size)


def pick_device(name: str) -> torch.device:
    """The CPU, or a GPU: this process's own where it holds one, else the first that it can see.

    Raises:
        UsageError: CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError('device is "cuda" but torch sees no GPU: install a CUDA build of torch or set device: auto')
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{_held[0] if _held else 0}")


_held: list[int] = []


def hold_device() -> None:
    """Take a GPU of this machine for this process, as long as it lives, where it can see several.

    For processes that make parts; a coordinator, which encodes a few images, shares the first one with them. A Ray
    worker, a container or a pod sees only what was given to it.

    Raises:
        UsageError: all are taken.
    """
    if not _held and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        _held.append(claim_slot("gpu", torch.cuda.device_count()))


@functools.cache
def claim_slot(name: str, count: int) -> int:
    """A number below `count` that no other process of this user on this machine holds; it is free when this one ends.

    Raises:
        UsageError: all are taken.
    """
    folder = private_folder("slots")
    for number in range(count):
        handle = os.open(folder / f"{name}-{number}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
        else:
            return number  # the handle stays open, and with it the lock, as long as the process lives
    raise UsageError(f"all {count} GPUs of this machine are held by other processes: lower execution.workers or wait")
