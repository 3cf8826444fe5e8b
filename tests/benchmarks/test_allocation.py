from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.allocation import allocate_timesteps

GRID = np.arange(25, 1000, 50)


def test_equal_noise_gives_an_even_grid() -> None:
    timesteps, weights = allocate_timesteps(GRID, np.ones(20), 5, 1000)
    np.testing.assert_allclose(timesteps, [100, 300, 500, 700, 900], atol=1)
    np.testing.assert_allclose(weights, [200] * 5)


def test_weights_add_up_to_the_schedule_and_stand_for_equal_shares_of_the_noise() -> None:
    deviations = np.linspace(1, 9, 20)
    timesteps, weights = allocate_timesteps(GRID, deviations, 4, 1000)
    assert sum(weights) == pytest.approx(1000)
    assert timesteps == sorted(set(timesteps))
    edges = np.concatenate([[0], np.cumsum(weights)])
    fine = np.repeat(deviations, 50)
    shares = [fine[round(start) : round(stop)].sum() for start, stop in itertools.pairwise(edges)]
    np.testing.assert_allclose(shares, np.mean(shares), rtol=0.02)


def test_it_has_less_noise_than_an_even_grid_of_as_many_timesteps() -> None:
    """Variance of the weighted mean of independent draws with these deviations."""
    deviations = np.concatenate([np.full(16, 1.0), np.full(4, 12.0)])
    timesteps, weights = allocate_timesteps(GRID, deviations, 5, 1000)
    at = deviations[np.array(timesteps) // 50]
    allocated = (np.array(weights) ** 2 * at**2).sum() / 1000**2
    even = (deviations[np.array([100, 300, 500, 700, 900]) // 50] ** 2).mean() / 5
    assert allocated < 0.6 * even


def test_where_all_the_noise_is_in_one_place_timesteps_that_fall_together_are_one() -> None:
    timesteps, weights = allocate_timesteps(np.array([0, 1]), np.array([0.0, 1.0]), 5, 2)
    assert len(timesteps) == len(set(timesteps)) == len(weights)
    assert sum(weights) == pytest.approx(2)
