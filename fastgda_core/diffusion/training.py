"""Train a small text-conditioned denoiser from scratch, as the demo's model was made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """Hyperparameters of `train_denoiser`."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    caption_dropout: float = 0.1  # trains the unconditional branch of classifier-free guidance
    ema_decay: float = 0.999
    seed: int = 0


def train_denoiser(
    unet: torch.nn.Module,
    schedule: Schedule,
    latents: Tensor,
    caption_embeddings: Tensor,
    caption_owner: Tensor,
    empty_embedding: Tensor,
    training: DenoiserTraining,
    on_step: Callable[[int, float, torch.nn.Module], None] | None = None,
) -> torch.nn.Module:
    """Minimise the diffusion loss over uniformly drawn (image, caption, timestep, noise); returns the EMA model.

    Args:
        unet: the denoiser to train, on its device.
        schedule: forward process and target.
        latents: (images, c, h, w).
        caption_embeddings: (captions, tokens, d_text).
        caption_owner: for each caption the row of its image, (captions,), sorted.
        empty_embedding: embedding of the empty caption, (tokens, d_text).
        training: hyperparameters.
        on_step: called with (step, loss, EMA model) after each step.
    """
    device = next(unet.parameters()).device
    draw = torch.Generator().manual_seed(training.seed)
    first_caption, captions_of = _caption_ranges(caption_owner, len(latents))
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.99)
    )
    warmup_cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / training.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / training.steps))
        ),
    )
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    unet.train()
    for step in range(training.steps):
        image = torch.randint(len(latents), (training.batch_size,), generator=draw)
        pick = torch.rand(training.batch_size, generator=draw)
        caption = first_caption[image] + (pick * captions_of[image]).long()
        dropped = torch.rand(training.batch_size, generator=draw) < training.caption_dropout
        text = torch.where(dropped[:, None, None], empty_embedding, caption_embeddings[caption].float())
        timesteps = torch.randint(schedule.train_timesteps, (training.batch_size,), generator=draw)
        clean = latents[image]
        noise = torch.randn(clean.shape, generator=draw)
        clean, text, timesteps, noise = (tensor.to(device) for tensor in (clean, text, timesteps, noise))
        loss = per_sample_loss(unet, schedule, clean, {"encoder_hidden_states": text}, timesteps, noise).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        warmup_cosine.step()
        # A short horizon at the start, so that the average does not remember the random initialisation.
        _update_ema(ema, unet, min(training.ema_decay, (step + 1) / (step + 10)))
        if on_step is not None:
            on_step(step, loss.item(), ema)
    return ema


def _caption_ranges(caption_owner: Tensor, images: int) -> tuple[Tensor, Tensor]:
    captions_of = torch.bincount(caption_owner, minlength=images)
    first_caption = torch.cumsum(captions_of, 0) - captions_of
    return first_caption, captions_of


@torch.no_grad()
def _update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
