"""A text-to-image diffusion model loaded from a diffusers-style folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from fastgda_core.diffusion.codec import Codec, load_codec
from fastgda_core.diffusion.pretrained import load_frozen
from fastgda_core.errors import UsageError

PARTS = ("unet", "scheduler", "text_encoder", "tokenizer", "vae")


@dataclass(frozen=True)
class DiffusionModel:
    """Denoiser, noise schedule, text encoder and codec of one model, in eval mode and frozen."""

    unet: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    codec: Codec
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, size, size)

    @property
    def resolution(self) -> int:
        """Side of the square images that the model makes, in pixels."""
        return self.unet.config.sample_size * self.codec.factor

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """Caption embeddings as the denoiser's cross-attention sees them, (n, tokens, d_text)."""
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # As Stable Diffusion's pipeline does: padding is hidden only from encoders whose config asks for it.
        hide_padding = getattr(self.text_encoder.config, "use_attention_mask", False)
        return self.text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask if hide_padding else None
        )[0]

    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """Latents of RGB images, (n, c, h, w): shorter side resized to the model's resolution, centre cropped."""
        pixels = np.stack([np.asarray(square(image, self.resolution)) for image in images])
        scaled = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.codec.encode(scaled)

    def decode_images(self, latents: Tensor) -> list[Image.Image]:
        pixels = ((self.codec.decode(latents).clamp(-1, 1) + 1) * 127.5).round().byte()
        return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def square(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` pixels with antialiasing and crop the centre."""
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def check_model_folder(folder: Path) -> None:
    """Raise `UsageError` unless `folder` has the layout of a diffusers text-to-image model."""
    if not folder.is_dir():
        raise UsageError(f"model.folder {folder} does not exist: give a diffusers model folder (with model_index.json)")
    missing = [name for name in ("model_index.json", *PARTS) if not (folder / name).exists()]
    if missing:
        raise UsageError(f"model.folder {folder} lacks {', '.join(missing)}: save the model with save_pretrained()")


def load_model(folder: Path, device: torch.device) -> DiffusionModel:
    """Load a model folder in float32; nothing is fetched and no pickle is read.

    Raises:
        UsageError: a part is missing or of a class that is not supported.
    """
    import transformers
    from diffusers import DDIMScheduler, UNet2DConditionModel

    check_model_folder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    if index.get("unet", [None, None])[1] != "UNet2DConditionModel":
        raise UsageError(f"{folder}/model_index.json: the denoiser must be a UNet2DConditionModel")
    try:
        unet = load_frozen(UNet2DConditionModel, folder / "unet", device, torch_dtype=torch.float32)
        encoder_class = getattr(transformers, index["text_encoder"][1])
        text_encoder = load_frozen(encoder_class, folder / "text_encoder", device, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        # Any diffusers scheduler config reads as DDIM's: the noise schedule and the target are what counts.
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        codec = load_codec(folder / "vae", device)
    except UsageError:
        raise
    except (OSError, AttributeError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"model.folder {folder} does not load: {' '.join(str(error).split())[:300]}") from error
    unet.to(memory_format=torch.channels_last)
    return DiffusionModel(unet, scheduler, text_encoder, tokenizer, codec, device)


def train_timesteps(folder: Path) -> int:
    """T_train of a model folder's noise schedule, without loading the model."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return int(json.loads(path.read_text()).get("num_train_timesteps", 1000))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path} is no scheduler config: save the model again ({error})") from error


def model_hash(folder: Path) -> str:
    """sha256 over the names and contents of the parts' files: a changed weight is a changed model."""
    check_model_folder(folder)
    digest = hashlib.sha256()
    for part in PARTS:
        for path in sorted(file for file in (folder / part).rglob("*") if file.is_file()):
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
