"""Generate images with classifier-free guidance (Ho & Salimans, 2022), by DDIM or by Euler steps of a flow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgda_core.diffusion.loss import concatenate, denoise
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stream_key
from fastgda_core.diffusion.schedule import DiffusionSchedule, FlowMatchingSchedule, Schedule
from fastgda_core.errors import UsageError


def can_generate(model: DiffusionModel) -> bool:
    """Return whether `generate` can follow the model's schedule; some pipelines shift theirs in a way of their own."""
    return not model.schedule.scheduler.config.get("use_dynamic_shifting")


class Step(NamedTuple):
    """One step of a sampler.

    timestep: of the model's schedule, an integer as in training.
    clean: the clean latents that the denoiser's guided output at this step stands for, (n, c, h, w).
    latents: after the step, (n, c, h, w).
    """

    timestep: int
    clean: Tensor
    latents: Tensor


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
    for step in journey(model, captions, numbers, seed=seed, steps=steps, guidance_scale=guidance_scale):
        latents = step.latents
    return latents


@torch.no_grad()
def journey(
    model: DiffusionModel, captions: list[str], numbers: list[int], *, seed: int, steps: int, guidance_scale: float
) -> Iterator[Step]:
    """Yield the steps by which `generate` comes to its latents, the noisiest first.

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
    condition = model.encode_captions(captions)
    distilled = "guidance" in condition  # the model is told the scale, and runs once
    if distilled:
        condition["guidance"] = torch.full_like(condition["guidance"], guidance_scale)
    else:
        condition = concatenate([model.encode_captions([""] * len(captions)), condition])
    for timestep in scheduler.timesteps:
        both = latents if distilled else torch.cat([latents, latents])
        guided = denoise(model.denoiser, both, timestep.expand(len(both)), condition)
        if not distilled:
            unconditional, conditional = guided.chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
        before, after = latents, scheduler.step(guided, timestep, latents, **options)
        clean = after.get("pred_original_sample")
        if clean is None:  # a flow: x_t = (1 - sigma) x + sigma eps, whose target is eps - x
            clean = before - guided * timestep / model.schedule.train_timesteps
        latents = after.prev_sample
        yield Step(_train_timestep(model.schedule, timestep), clean, latents)


def _train_timestep(schedule: Schedule, timestep: Tensor) -> int:
    """Return the timestep of training that is nearest to one of a sampler."""
    if isinstance(schedule, FlowMatchingSchedule):
        return int((schedule.sigmas - timestep.cpu() / schedule.train_timesteps).abs().argmin())
    return int(timestep)
