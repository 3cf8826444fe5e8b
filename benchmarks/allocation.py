"""Where to take a loss's timesteps when their noise differs."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray


def allocate_timesteps(
    timesteps: NDArray[np.int64], deviations: NDArray[np.float64], count: int, train_timesteps: int
) -> tuple[list[int], list[float]]:
    """Timesteps as dense as a score's noise is large there, and the stretch of the schedule that each stands for.

    Neyman allocation (1934): of all plans with `count` timesteps whose weighted mean still estimates the mean over
    the whole schedule, the one with the least noise puts them in proportion to its standard deviation.

    Args:
        timesteps: (k,) ascending, evenly spaced, where the deviation was measured.
        deviations: (k,) standard deviation of a score's noise at each.
        count: how many timesteps to choose.
        train_timesteps: T_train.

    Returns:
        distinct timesteps, ascending, and their weights, which add up to T_train; `count` of them, or fewer where
        two fall together.
    """
    edges = np.linspace(0, train_timesteps, len(timesteps) + 1)
    mass = np.concatenate([[0], np.cumsum(deviations)]) / deviations.sum()
    cuts = np.interp(np.linspace(0, 1, count + 1), mass, edges)
    cuts[0], cuts[-1] = 0, train_timesteps  # also where an end of the schedule has no noise at all
    merged: dict[int, float] = {}
    for start, stop in itertools.pairwise(cuts):
        middle = min(int((start + stop) / 2), train_timesteps - 1)
        merged[middle] = merged.get(middle, 0.0) + float(stop - start)
    return list(merged), list(merged.values())
