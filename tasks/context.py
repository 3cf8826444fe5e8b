"""The context that every task of a run shares: workspace, device, loaded model."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file

from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.adapter import adapter_hash, check_adapter
from fastgda_core.diffusion.checkpoints import check_checkpoint, checkpoint_hash
from fastgda_core.diffusion.folder import read_index
from fastgda_core.diffusion.model import DiffusionModel, at_checkpoint, load_model, model_hash, with_adapter
from fastgda_core.diffusion.precision import Precision
from fastgda_core.diffusion.weights import check_weights
from fastgda_core.teachers.micro_batch import MicroBatch
from storage_schemas.files import AnyPath, Stamps, folder_stamps, read_whole
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.config.teaching import ModelConfig
from tasks.devices import pick_device

T = TypeVar("T")
Resolution = int | tuple[int, int] | None
Where = tuple[Path, str, torch.device, Path | None, Resolution]  # folder, hash, device, adapter, resolution


class Loaded:
    """The things that a process has in memory of one run, the last few of each kind; it goes when the run goes."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[Hashable, Any]] = {}
        self._lock = threading.RLock()

    def once(self, kind: str, key: Hashable, load: Callable[[], T], most: int = 1) -> T:
        """Return what `load` gives, called once for each key until `most` other ones of this kind were asked for."""
        with self._lock:
            kept = self._kept.setdefault(kind, {})
            if key not in kept:
                if len(kept) >= most:  # goes first: the device may not hold one more
                    del kept[next(iter(kept))]
                kept[key] = load()
            found: T = kept[key]
            return found


@dataclass(frozen=True)
class Context:
    """The things that the tasks of one run share.

    loaded: without the model, which the next run in this process shares, as a rule. Contexts that are made of this one
    by `dataclasses.replace` share it.
    checkpoint_hashes: of the weights of `teacher.checkpoints`, in order.
    checkpoint: which of several the teacher looks at; see `at_checkpoints`.
    """

    config: PipelineConfig
    model_hash: str
    loaded: Loaded = field(default_factory=Loaded, compare=False, repr=False)
    checkpoint_hashes: tuple[str, ...] = ()
    checkpoint: int | None = None

    @property
    def workspace(self) -> Workspace:
        return _workspace(self.config.workspace)

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.device)

    def model(self) -> DiffusionModel:
        """Return the attributed model, which generates, encodes and is trained again; loaded once per process."""
        return _load_model(*self._where)

    @property
    def _where(self) -> Where:
        model = self.config.model
        return model.folder, self.model_hash, self.device, model.adapter, model.resolution

    def teacher_model(self, precision: Precision | None = None) -> DiffusionModel:
        """Return the model as the teacher runs it: at the teacher's checkpoint, with the teacher's objective."""
        config = self.config
        precision = precision or config.teacher.precision
        if self._checkpoint is None:
            model = _teacher_model(self._where, precision, config.model.compile)
        else:
            model = self._at_checkpoint(self._checkpoint, precision)
        return model.with_objective(config.teacher.objective)

    def at_checkpoints(self) -> list[Context]:
        """Return the context at each of the teacher's checkpoints; itself alone where there are not several."""
        count = len(self.config.teacher.checkpoints)
        return [self] if count < 2 else [replace(self, checkpoint=number) for number in range(count)]

    def named(self, kind: str) -> str:
        """Return the name of a kind of part that is made at this checkpoint."""
        return self.config.teacher.at_checkpoints(kind)[self._checkpoint or 0]

    @property
    def taught_at(self) -> tuple[str, ...]:
        """The hash of the teacher's checkpoint, for keys; nothing where it looks at the model's own weights."""
        return () if self._checkpoint is None else (self.checkpoint_hashes[self._checkpoint],)

    @property
    def _checkpoint(self) -> int | None:
        checkpoints = len(self.config.teacher.checkpoints)
        assert checkpoints < 2 or self.checkpoint is not None, "which of several? see at_checkpoints"
        return self.checkpoint if checkpoints > 1 else (0 if checkpoints else None)

    def _at_checkpoint(self, number: int, precision: Precision) -> DiffusionModel:
        """Return the model at a checkpoint; a run keeps those that it scores with, and one more to check them."""
        config = self.config

        def load() -> DiffusionModel:
            folder, checkpoint = config.model.folder, config.teacher.checkpoints[number]
            if config.model.adapter is not None:
                found = with_adapter(self.model(), folder, checkpoint)
            else:
                found = at_checkpoint(self.model(), checkpoint, read_index(folder).denoiser_part)
            found = found.in_precision(precision)
            return found.compiled() if config.model.compile else found

        most = len(config.teacher.checkpoints) + 1
        return self.loaded.once("checkpoints", (number, precision), load, most=most)

    def layers(self, model: DiffusionModel) -> dict[str, Layer]:
        """Return the layers whose weights the unlearning step moves."""
        return select_layers(model.denoiser, self.config.teacher.layers)

    def micro_batch(self, purpose: str) -> MicroBatch:
        """Return the forwards at a time, one size per process and kind of work.

        A size that once ran out of memory is not tried again.
        """
        teacher = self.config.teacher
        return _micro_batch(
            self.config.model.micro_batch, self.model_hash, self.device, purpose, teacher.layers, teacher.precision
        )


_workspace = functools.lru_cache(maxsize=8)(Workspace.at)


def load_tensors(path: AnyPath) -> dict[str, torch.Tensor]:
    """Load a safetensors file, on disk or in an object store."""
    return load_file(path) if isinstance(path, Path) else load_bytes(read_whole(path))


@functools.lru_cache(maxsize=1)
def _load_model(
    folder: Path, _model_hash: str, device: torch.device, adapter: Path | None, resolution: Resolution
) -> DiffusionModel:
    return load_model(folder, device, adapter=adapter, resolution=resolution)


@functools.lru_cache(maxsize=2)
def _teacher_model(where: Where, precision: Precision, compiled: bool) -> DiffusionModel:
    model = _load_model(*where).in_precision(precision)
    return model.compiled() if compiled else model


@functools.lru_cache(maxsize=32)
def _micro_batch(size: int, *_where: object) -> MicroBatch:
    return MicroBatch(size)


def open_context(config: PipelineConfig, *, model: bool = True) -> Context:
    """Open the context of a configuration; `model` says whether the diffusion model is needed.

    Raises:
        UsageError: the model, its weights or a checkpoint cannot be used; this is found before any work.
    """
    if not model:
        return Context(config, "")
    folder, adapter, teacher = config.model.folder, config.model.adapter, config.teacher
    check_weights(folder)
    if adapter is not None:
        check_adapter(adapter, folder)
    for checkpoint in teacher.checkpoints:
        if adapter is None:
            check_checkpoint(checkpoint, folder)
        else:
            check_adapter(checkpoint, folder)
    hash_of = _checkpoint_hash if adapter is None else _adapter_hash
    hashes = tuple(hash_of(each, folder, folder_stamps(each)) for each in teacher.checkpoints)
    layers = "lora" if adapter is not None else read_index(folder).architecture.layers
    config = config.model_copy(update={"teacher": teacher.with_default_layers(layers)})
    return Context(config, _named_model(config.model), checkpoint_hashes=hashes)


def _named_model(config: ModelConfig) -> str:
    """Return the hash that everything which comes of a model is named after."""
    found = _model_hash(config.folder, folder_stamps(config.folder))
    over = (
        [] if config.adapter is None else [_adapter_hash(config.adapter, config.folder, folder_stamps(config.adapter))]
    )
    over += [] if config.resolution is None else [str(config.resolution)]
    return hashlib.sha256(" ".join([found, *over]).encode()).hexdigest() if over else found


@functools.lru_cache(maxsize=16)
def _checkpoint_hash(folder: Path, model: Path, _files: Stamps) -> str:
    return checkpoint_hash(folder, model)


@functools.lru_cache(maxsize=16)
def _adapter_hash(folder: Path, _model: Path, _files: Stamps) -> str:
    return adapter_hash(folder)


@functools.lru_cache(maxsize=4)
def _model_hash(folder: Path, _files: Stamps) -> str:
    """Hash a model's gigabytes once per process, however many flows ask, as long as no file changes."""
    return model_hash(folder)
