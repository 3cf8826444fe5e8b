"""Generate images with classifier-free guidance (Ho & Salimans, 2022), by DDIM or by Euler steps of a flow."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastgda_core.diffusion.loss import concatenate, denoise
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stream_key
from fastgda_core.diffusion.schedule import DiffusionSchedule
from fastgda_core.errors import UsageError


def can_generate(model: DiffusionModel) -> bool:
    """Return whether `generate` can follow the model's schedule; some pipelines shift theirs in a way of their own."""
    return not model.schedule.scheduler.config.get("use_dynamic_shifting")


@torch.no_grad()
def generate(
    model: DiffusionModel, captions: list[str], numbers: list[int], *, seed: int, steps: int, guidance_scale: float
) -> Tensor:
    """Generate latents of one image per caption, (n, c, h, w).

    The starting noise of query number i is a function of (seed, i) alone, so an image does not
    depend on which others are made with it.

    Raises:
        UsageError: the schedule is one that its pipeline shifts (`can_generate`).
    """
    if not can_generate(model):
        raise UsageError(
            "the model's scheduler has use_dynamic_shifting, which each pipeline does its own way: generate the "
            "queries with it and give them as queries.shards"
        )
    scheduler = copy.deepcopy(model.schedule.scheduler)
    scheduler.set_timesteps(steps, device=model.device)
    owners = torch.tensor(numbers, device=model.device)
    zeros = torch.zeros_like(owners)
    latents = gaussian_noise(stream_key(seed, "generation"), owners, zeros, zeros, model.latent_shape)
    # Where DDIM clips the clean image, the noise must follow it: guidance otherwise adds up to noise.
    options = {"use_clipped_model_output": True} if isinstance(model.schedule, DiffusionSchedule) else {}
    condition = concatenate([model.encode_captions([""] * len(captions)), model.encode_captions(captions)])
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents])
        unconditional, conditional = denoise(model.denoiser, both, timestep.expand(len(both)), condition).chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents, **options).prev_sample
    return latents
