"""Importance sampling of timesteps: few gradients then estimate the mean Fisher well."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 10
EVEN_SHARE = 0.1  # of the rows, drawn evenly whatever a pilot found: bounds every weight by 1 / EVEN_SHARE


def timestep_density(timesteps: Tensor, squared_norms: Tensor, train_timesteps: int) -> Tensor:
    """Return how densely to draw timesteps, (BINS,) over equal stretches of the schedule, of mean 1.

    Importance sampling has the least variance where the density is proportional to the root mean square of what is
    averaged (Kahn & Marshall, 1953), here squared gradient norms.

    Args:
        timesteps: of a first, small sample (the pilot), spread over the schedule, (n,).
        squared_norms: of the whole per-sample gradient at each of these timesteps, (n,).
        train_timesteps: T_train.
    """
    number = timesteps * BINS // train_timesteps
    squares = torch.zeros(BINS, dtype=torch.float64).index_add_(0, number, squared_norms.double().square())
    size = (squares / torch.bincount(number, minlength=BINS).clamp(min=1)).sqrt()
    if not size.any():
        return torch.ones_like(size)
    density = EVEN_SHARE + (1 - EVEN_SHARE) * size / size.mean()
    # Rounded to steps of a fifth: the pilot's gradients round differently on another device or in halved batches, and
    # the timesteps must stay the same.
    density = (density.log2() * 4).round().div(4).exp2()
    return density / density.mean()


def weighted_timesteps(quantiles: Tensor, density: Tensor, train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Return timesteps of this density, (n,), and the weight of each in a mean over the schedule, (n,) float32.

    Args:
        quantiles: (n,) in [0, 1).
        density: (bins,) over equal stretches, of mean 1.
        train_timesteps: T_train.
    """
    bins = len(density)
    edges = torch.cat([density.new_zeros(1), density.cumsum(0) / bins])
    place = (torch.searchsorted(edges, quantiles.double(), right=True) - 1).clamp(0, bins - 1)
    within = (quantiles - edges[place]) * bins / density[place]
    timesteps = ((place + within) / bins * train_timesteps).long().clamp_(0, train_timesteps - 1)
    return timesteps, density[place].reciprocal().float()
