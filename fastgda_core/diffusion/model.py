"""A text-to-image diffusion model loaded from a diffusers folder."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from fastgda_core.diffusion import schedule
from fastgda_core.diffusion.adapter import add_adapter
from fastgda_core.diffusion.architectures.architecture import CaptionParts
from fastgda_core.diffusion.captions import CaptionEncoder, load_text_encoder
from fastgda_core.diffusion.codec import Codec, load_codec
from fastgda_core.diffusion.folder import TEXT_ENCODERS, ModelIndex, read_index
from fastgda_core.diffusion.loss import Condition, Denoiser, per_sample_loss
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision, running
from fastgda_core.diffusion.pretrained import load_frozen
from fastgda_core.errors import UsageError
from fastgda_core.images import filling


@dataclass(frozen=True)
class DiffusionModel:
    """Denoiser, noise schedule, caption encoder and codec of one model, in eval mode and frozen."""

    denoiser: Any
    schedule: schedule.Schedule
    captions: CaptionEncoder
    codec: Codec
    device: torch.device
    precision: Precision = Precision.float32
    objective: Objective = Objective.loss
    # Compiled denoisers by what they were compiled for; None: the denoiser is run as it is.
    compiled_denoisers: dict[Any, Any] | None = None
    size: tuple[int, int] | None = None  # height and width of a latent; None: the denoiser's sample_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        config = self.denoiser.config
        height, width = self.size or (config.sample_size, config.sample_size)
        return (getattr(self.denoiser, "latent_channels", None) or config.in_channels, height, width)

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of the images that the model makes, in pixels."""
        _, height, width = self.latent_shape
        return height * self.codec.factor, width * self.codec.factor

    def in_precision(self, precision: Precision) -> DiffusionModel:
        """Return the same model run in `precision`; the denoiser's weights are shared unless their type changes."""
        same = precision.dtype is self.precision.dtype
        denoiser = self.denoiser if same else copy.deepcopy(self.denoiser).to(precision.dtype)
        model = replace(self, precision=precision, denoiser=denoiser)
        return model if self.compiled_denoisers is None else model.compiled()

    def with_objective(self, objective: Objective) -> DiffusionModel:
        """Return the same model, whose `losses` are values of another objective."""
        return replace(self, objective=objective)

    def compiled(self) -> DiffusionModel:
        """Return the same model with its denoiser compiled by torch, at the first use of each kind of forward."""
        return replace(self, compiled_denoisers={})

    def losses(
        self,
        clean: Tensor,
        condition: Condition,
        timesteps: Tensor,
        noise: Tensor,
        denoiser: Denoiser | None = None,
    ) -> Tensor:
        """Return the model's objective for each sample, (n,), computed in the model's precision.

        A `denoiser`, where given, stands in for the model's own.
        """
        dtype = self.precision.dtype
        condition = {name: _cast(tensor, dtype) for name, tensor in condition.items()}
        with running(self.precision, self.device):
            return per_sample_loss(
                denoiser or self._denoiser(),
                self.schedule,
                clean.to(dtype),
                condition,
                timesteps,
                noise.to(dtype),
                self.objective,
            )

    def _denoiser(self) -> Any:
        if self.compiled_denoisers is None or torch.is_grad_enabled():
            return self.denoiser
        if "forward" not in self.compiled_denoisers:
            self.compiled_denoisers["forward"] = torch.compile(self.denoiser)
        return self.compiled_denoisers["forward"]

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the condition of each caption, (n, ...) each."""
        return self.captions(captions)

    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """Return latents of RGB images, (n, c, h, w).

        An image is resized until it fills the model's resolution, and the centre cropped.
        """
        height, width = self.resolution
        pixels = np.stack([np.asarray(filling(image, width, height)) for image in images])
        scaled = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.codec.encode(scaled)

    def decode_images(self, latents: Tensor) -> list[Image.Image]:
        """Return the 8-bit RGB images of latents, (n, c, h, w)."""
        pixels = ((self.codec.decode(latents).clamp(-1, 1) + 1) * 127.5).round().byte()
        return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def load_model(
    folder: Path,
    device: torch.device,
    precision: Precision = Precision.float32,
    adapter: Path | None = None,
    resolution: int | tuple[int, int] | None = None,
) -> DiffusionModel:
    """Load a model folder; nothing is fetched and no pickle is read.

    Args:
        folder: of diffusers.
        device: where to put the model.
        precision: of the denoiser.
        adapter: the folder of a LoRA over the denoiser.
        resolution: pixels a side, or width and height, where the model's own is not meant.

    Raises:
        UsageError: a part is missing or of a class that is not supported.
    """
    index = read_index(folder)
    try:
        part = index.denoiser_part
        denoiser = load_frozen(index.architecture.load_class(), folder / part, device, torch_dtype=precision.dtype)
        if adapter is not None:
            add_adapter(denoiser, adapter, part)
        codec = load_codec(folder / "vae", device)
        own = denoiser.config.get("sample_size", index.architecture.sample_size)
        size = (own, own) if resolution is None else _latent_size(codec, resolution)
        if index.architecture.squares and size[0] != size[1]:
            raise UsageError(f"model.resolution is {resolution}: {index.architecture.denoiser} makes squares alone")
        captions = _load_captions(folder, index, denoiser, (size[0] * codec.factor, size[1] * codec.factor))
        process = schedule.load_schedule(folder / "scheduler")
        model = DiffusionModel(denoiser, process, captions, codec, device, precision, size=size)
    except UsageError:
        raise
    except (OSError, AttributeError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"model.folder {folder} does not load: {' '.join(str(error).split())[:300]}") from error
    denoiser.to(memory_format=torch.channels_last)
    return model


def _latent_size(codec: Codec, resolution: int | tuple[int, int]) -> tuple[int, int]:
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    for pixels in (width, height):
        if pixels % (2 * codec.factor):  # Transformers see their latents in blocks of 2 x 2.
            raise UsageError(f"model.resolution has {pixels}: make it a multiple of {2 * codec.factor} pixels")
    return height // codec.factor, width // codec.factor


def _load_captions(folder: Path, index: ModelIndex, denoiser: Any, resolution: tuple[int, int]) -> CaptionEncoder:
    encoders = {
        part: load_text_encoder(folder, part, index.classes[part], denoiser.device)
        for part in index.parts
        if part in TEXT_ENCODERS
    }
    zeros = index.zeros_for_empty_caption
    parts = CaptionParts(denoiser, encoders, resolution, index.pipeline, index.labels, zeros)
    return index.architecture.captions(parts)


def at_checkpoint(model: DiffusionModel, checkpoint: Path, part: str) -> DiffusionModel:
    """Return the same model with its denoiser as of another step of the training; the other parts are shared.

    Args:
        model: in float32, as `load_model` gives it.
        checkpoint: a folder that `checkpoints.check_checkpoint` has passed.
        part: the denoiser's folder in it, `unet` or `transformer`.

    Raises:
        UsageError: the weights do not load.
    """
    try:
        denoiser = load_frozen(type(model.denoiser), checkpoint / part, model.device, torch_dtype=model.precision.dtype)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        told = " ".join(str(error).split())[:300]
        raise UsageError(f"teacher.checkpoints: {checkpoint / part} does not load: {told}") from error
    denoiser.to(memory_format=torch.channels_last)
    return replace(model, denoiser=denoiser)


def with_adapter(model: DiffusionModel, folder: Path, adapter: Path) -> DiffusionModel:
    """Return the same model with another LoRA over its denoiser; the other parts are shared.

    Args:
        model: in float32, as `load_model` gives it.
        folder: where it was loaded from.
        adapter: a folder that `adapter.check_adapter` has passed.
    """
    part = read_index(folder).denoiser_part
    denoiser = load_frozen(type(model.denoiser), folder / part, model.device, torch_dtype=model.precision.dtype)
    add_adapter(denoiser, adapter, part)
    denoiser.to(memory_format=torch.channels_last)
    return replace(model, denoiser=denoiser)


def train_timesteps(folder: Path) -> int:
    """Return T_train of a model folder's noise schedule, without loading the model."""
    return schedule.train_timesteps(folder / "scheduler")


def model_hash(folder: Path) -> str:
    """Return a sha256 over the names and contents of the parts' files: a changed weight is a changed model."""
    index = read_index(folder)
    digest = hashlib.sha256(json.dumps(index.labels).encode() if index.labels else b"")
    for part in sorted(index.parts):
        for path in sorted(file for file in (folder / part).rglob("*") if file.is_file()):
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
