"""Image <-> latent codecs: a VAE where the model folder has one, pixel folding where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgda_core.diffusion.pretrained import load_frozen
from fastgda_core.errors import UsageError


class Codec(Protocol):
    """Maps images in [-1, 1], (n, 3, h, w), to the latents that the denoiser was trained on and back."""

    factor: int  # pixels per latent position, along a side

    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class PixelUnshuffle:
    """Folds each `factor` x `factor` block of pixels into channels: lossless, no weights.

    (n, 3, h, w) becomes (n, 3 * factor^2, h / factor, w / factor).
    """

    class_name = "PixelUnshuffle"

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(latents, self.factor)

    def save(self, folder: Path) -> None:
        """Write the `config.json` of a `vae/` folder that `load_codec` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": self.class_name, "factor": self.factor}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class VaeCodec:
    """A diffusers `AutoencoderKL`: latents are the posterior mean, shifted and scaled as in its config."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return (self.vae.encode(images).latent_dist.mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scale + self.shift).sample


class DeepCodec:
    """A diffusers `AutoencoderDC`: latents without a posterior, scaled as in its config."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.factor = 2 ** (len(vae.config.encoder_block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latent * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scale).sample


def load_codec(folder: Path, device: torch.device) -> Codec:
    """Load `vae/` of a diffusers-style model folder.

    Raises:
        UsageError: the folder has no config or names a class that is not known here.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UsageError(f"{config_path} is missing: a model folder needs vae/config.json")
    config = json.loads(config_path.read_text())
    match config.get("_class_name"):
        case PixelUnshuffle.class_name:
            return PixelUnshuffle(int(config["factor"]))
        case "AutoencoderKL":
            from diffusers import AutoencoderKL

            return VaeCodec(load_frozen(AutoencoderKL, folder, device, torch_dtype=torch.float32))
        case "AutoencoderDC":
            from diffusers import AutoencoderDC

            return DeepCodec(load_frozen(AutoencoderDC, folder, device, torch_dtype=torch.float32))
        case other:
            raise UsageError(
                f"{config_path} names the codec {other!r}: known are AutoencoderKL, AutoencoderDC and "
                f"{PixelUnshuffle.class_name}"
            )
