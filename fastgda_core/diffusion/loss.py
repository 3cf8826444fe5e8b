"""The diffusion training loss of a model per sample, and the objective that may take its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastgda_core.diffusion.objective import RATIO_EPSILON, Objective
from fastgda_core.diffusion.schedule import Schedule

# The denoiser's condition, one row per caption, by the name of its keyword argument; `a.b` is entry b of the
# dictionary that the denoiser takes as argument a.
Condition = Mapping[str, Tensor]
Denoiser = Callable[..., tuple[Tensor, ...]]


def take(condition: Condition, rows: Tensor | slice) -> dict[str, Tensor]:
    """Return some rows of a condition."""
    return {name: tensor[rows] for name, tensor in condition.items()}


def concatenate(conditions: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the rows of several conditions, one after the other."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def denoise(denoiser: Denoiser, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """Return the denoiser's output, (n, c, h, w), without the half in which some denoisers predict a variance."""
    arguments: dict[str, object] = {}
    for name, tensor in condition.items():
        argument, _, entry = name.partition(".")
        if entry:
            group = arguments.setdefault(argument, {})
            assert isinstance(group, dict)
            group[entry] = tensor
        else:
            arguments[argument] = tensor
    return denoiser(noisy, timestep=timesteps, return_dict=False, **arguments)[0][:, : noisy.shape[1]]


def per_sample_loss(
    denoiser: Denoiser,
    schedule: Schedule,
    clean: Tensor,
    condition: Condition,
    timesteps: Tensor,
    noise: Tensor,
    objective: Objective = Objective.loss,
) -> Tensor:
    """Return `|| target - model(x_t, c, t) ||^2 / n_elements` of each sample, (n,).

    This is the conditional loss, without guidance. For the objective `output_norm` the target is 0; for `ratio` it is
    half the logarithm of the loss.

    Args:
        denoiser: a UNet or a transformer of diffusers, or what is called as one.
        schedule: forward process and target.
        clean: latents, (n, c, h, w).
        condition: of each row.
        timesteps: (n,) integers in [0, train_timesteps).
        noise: standard normal, (n, c, h, w).
        objective: what of the output is returned.
    """
    noisy = schedule.add_noise(clean, noise, timesteps)
    residual = denoise(denoiser, noisy, schedule.model_timesteps(timesteps), condition)
    if objective is not Objective.output_norm:
        residual = residual - schedule.target(clean, noise, timesteps)
    squared = residual.square().flatten(1).mean(1)
    return (squared + RATIO_EPSILON / 2).log() / 2 if objective is Objective.ratio else squared
