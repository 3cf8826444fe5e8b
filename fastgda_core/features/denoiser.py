"""Encoders that are parts of the attributed model itself: its captions' tokens, and the middle of its denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastgda_core.diffusion.captions import CaptionTokens
from fastgda_core.diffusion.loss import denoise, take
from fastgda_core.diffusion.model import DiffusionModel, load_model
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import UsageError
from fastgda_core.features.encoder import Encoder

TIMESTEPS = 4  # of T_train, evenly spaced: the middles of its quarters


def load_caption_tokens(source: str, device: torch.device) -> Encoder:
    """Load the mean of a caption's tokens as the denoiser is given them, start and end among them, padding not.

    Max-sim of single tokens (Khattab & Zaharia, "ColBERT", 2020) was measured beside the mean, with the fixed
    dimensional encodings that make an inner product of it (Dhulipala et al., "MUVERA", 2024): benchmarks/inputs.py.

    Raises:
        UsageError: the model has no tokens, or does not load.
    """
    captions = load_model(Path(source), device).captions
    if not isinstance(captions, CaptionTokens):
        raise UsageError("the model knows classes by number, and has no tokens")

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        tokens, said = captions(texts)["encoder_hidden_states"].float(), captions.said(texts)[..., None]
        return ((tokens * said).sum(1) / said.sum(1)).cpu()

    return Encoder("text", encode)


def load_bottleneck(source: str, device: torch.device) -> Encoder:
    """Load the activations in the middle of the denoiser, mean over positions, at four timesteps laid end to end.

    Every image gets the same noise, a function of the timestep alone, so two images differ by what they show. The
    condition is the empty caption, as an encoder sees images or captions.

    Raises:
        UsageError: the denoiser has no middle block, or the model does not load.
    """
    model = load_model(Path(source), device)
    block = _middle(model.denoiser)
    timesteps, noise = _noise(model)
    condition = model.encode_captions([""])

    @torch.no_grad()
    def encode(images: list[Image.Image]) -> Tensor:
        clean = model.encode_images([image.convert("RGB") for image in images])
        each, seen = take(condition, torch.zeros(len(clean), dtype=torch.long, device=device)), []
        hook = block.register_forward_hook(lambda *call: seen.append(_pooled(call[-1])))
        try:
            for timestep, same in zip(timesteps, noise, strict=True):
                times = timestep.expand(len(clean))
                noisy = model.schedule.add_noise(clean, same.expand_as(clean), times)
                denoise(model.denoiser, noisy, model.schedule.model_timesteps(times), each)
        finally:
            hook.remove()
        return torch.cat(seen, dim=1).float().cpu()

    return Encoder("image", encode)


def _noise(model: DiffusionModel) -> tuple[Tensor, Tensor]:
    """Return the timesteps, (T,), and the noise of each, (T, c, h, w): that of a noise plan's sample 0."""
    train = model.schedule.train_timesteps
    count = min(TIMESTEPS, train)
    plan = NoisePlan(seed=0, timesteps=count, draws=1, first_timestep=train // count // 2)
    timesteps = plan.timestep_values(train)[:count].to(model.device)
    zeros = torch.zeros_like(timesteps)
    return timesteps, plan.noise(zeros, zeros, zeros, timesteps, zeros, model.latent_shape)


def _middle(denoiser: Any) -> nn.Module:
    """Return the middle block of a UNet, or that of a transformer's row of blocks."""
    blocks = getattr(denoiser, "transformer_blocks", None)
    block: nn.Module | None = blocks[len(blocks) // 2] if blocks else getattr(denoiser, "mid_block", None)
    if block is None:
        raise UsageError("the denoiser has no middle block")
    return block


def _pooled(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the mean over positions of a block's output, (n, d); blocks of two streams give the image's last."""
    hidden = output if isinstance(output, Tensor) else output[-1]
    return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)
