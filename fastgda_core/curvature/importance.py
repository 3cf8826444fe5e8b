"""At which timesteps to look at gradients so that few of them say much of the mean Fisher."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 10
EVEN_SHARE = 0.1  # of the rows, drawn evenly whatever a pilot found: bounds every weight by 1 / EVEN_SHARE


def timestep_density(timesteps: Tensor, squared_norms: Tensor, train_timesteps: int) -> Tensor:
    """How densely to draw timesteps, (BINS,) over equal stretches of the schedule, of mean 1.

    In proportion to the root mean square of what is averaged, here squared gradient norms, importance sampling has the
    least variance (Kahn & Marshall, 1953).

    Args:
        timesteps: (n,), spread over the schedule, of a pilot.
        squared_norms: (n,), of the whole per-sample gradient at each.
        train_timesteps: T_train.
    """
    number = timesteps * BINS // train_timesteps
    squares = torch.zeros(BINS, dtype=torch.float64).index_add_(0, number, squared_norms.double().square())
    size = (squares / torch.bincount(number, minlength=BINS).clamp(min=1)).sqrt()
    if not size.any():
        return torch.ones_like(size)
    density = EVEN_SHARE + (1 - EVEN_SHARE) * size / size.mean()
    # In steps of a fifth: where a pilot's gradients round otherwise, on another device or in halved batches, no
    # timestep must move.
    density = (density.log2() * 4).round().div(4).exp2()
    return density / density.mean()


def weighted_timesteps(quantiles: Tensor, density: Tensor, train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Timesteps of this density, (n,), and what each weighs in a mean over the schedule, (n,) float32.

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
