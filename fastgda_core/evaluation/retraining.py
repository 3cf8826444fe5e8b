"""Models that are trained again: without which samples, from which weights, and what they lose on a query."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgda_core.diffusion.loss import Condition
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stratified_timesteps, stream_key
from fastgda_core.diffusion.objective import Objective
from fastgda_core.teachers.micro_batch import MicroBatch


def random_subset(samples: int, number: int, *, seed: int, share: float = 0.5) -> Tensor:
    """Return which samples the `number`-th model of a pool is trained on, (samples,) bool; the rest is removed.

    It is a function of these arguments alone, so that a pool can be made larger, and by several workers.
    """
    order = np.random.default_rng([seed, number]).permutation(samples)
    return torch.from_numpy(order < round(share * samples))


def to_train(model: DiffusionModel, *, seed: int, continued: bool) -> Any:
    """Return a denoiser to train in the model's place, on its device, in float32.

    Args:
        seed: of fresh weights.
        continued: begin with the model's own weights; else with fresh ones of the same architecture.
    """
    if continued:
        denoiser = copy.deepcopy(model.denoiser)
    else:
        with torch.random.fork_rng(devices=[]):  # whatever else draws from torch's own stream
            torch.manual_seed(seed)
            denoiser = type(model.denoiser).from_config(model.denoiser.config)
    return denoiser.to(model.device).float().requires_grad_(True)


@torch.no_grad()
def query_losses(
    model: DiffusionModel,
    denoiser: Any,
    latent: Tensor,
    condition: Condition,
    *,
    owner: int,
    seed: int,
    pairs: int,
    micro_batch: MicroBatch,
) -> tuple[Tensor, Tensor]:
    """Return the training loss of an image under a denoiser at stratified (timestep, noise) pairs, the same for all.

    Args:
        model: whose schedule and conditions the denoiser shares.
        denoiser: the retrained one.
        latent: of the image, (c, h, w).
        condition: of its caption, one row.
        owner: a number that stands for the image in the noise stream, in [0, 2^48).
        seed: of the noise stream.
        pairs: how many.
        micro_batch: forwards at a time.

    Returns:
        losses, (pairs,) float64, and timesteps, (pairs,), on the CPU.
    """
    losses_of, timesteps = _at_pairs(model, denoiser, latent, condition, owner, seed, pairs)
    found = torch.cat([losses for _, losses in micro_batch.run(pairs, losses_of)])
    return found.double().cpu(), timesteps.cpu()


def query_gradient(
    model: DiffusionModel,
    denoiser: Any,
    latent: Tensor,
    condition: Condition,
    *,
    owner: int,
    seed: int,
    pairs: int,
    micro_batch: MicroBatch,
) -> Tensor:
    """Return the gradient of the mean of `query_losses` with respect to all of a denoiser's weights, one after another.

    Takes what `query_losses` takes; the denoiser's weights may be frozen.

    Returns:
        (weights,) of the weights' type and on their device.
    """
    free = copy.deepcopy(denoiser).requires_grad_(True)
    weights = list(free.parameters())
    losses_of, _ = _at_pairs(model, free, latent, condition, owner, seed, pairs)

    def gradients_of(stretch: slice) -> Tensor:
        found = torch.autograd.grad(losses_of(stretch).sum() / pairs, weights)
        return torch.cat([each.flatten() for each in found])

    return torch.stack([gradient for _, gradient in micro_batch.run(pairs, gradients_of)]).sum(0)


def _at_pairs(
    model: DiffusionModel, denoiser: Any, latent: Tensor, condition: Condition, owner: int, seed: int, pairs: int
) -> tuple[Callable[[slice], Tensor], Tensor]:
    """Return a function from a stretch of an image's (timestep, noise) pairs to its losses there, and the timesteps."""
    plain = replace(model, denoiser=denoiser, objective=Objective.loss, compiled_denoisers=None)
    timesteps = stratified_timesteps(stream_key(seed, "judge timesteps"), owner, pairs, model.schedule.train_timesteps)
    noise_key, draws = stream_key(seed, "judge noise"), torch.arange(pairs, device=model.device)
    timesteps = timesteps.to(model.device)

    def losses_of(stretch: slice) -> Tensor:
        rows, owners = len(draws[stretch]), torch.full_like(draws[stretch], owner)
        noise = gaussian_noise(noise_key, owners, timesteps[stretch], draws[stretch], tuple(latent.shape))
        several = {name: row.expand(rows, *row.shape[1:]) for name, row in condition.items()}
        return plain.losses(latent.expand(rows, *latent.shape), several, timesteps[stretch], noise)

    return losses_of, timesteps
