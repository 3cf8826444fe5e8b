"""Timesteps drawn where gradients are large, and weighed back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import DiagonalFisher, EkfacFisher, fit_fisher
from fastgda_core.curvature.importance import BINS, EVEN_SHARE, timestep_density, weighted_timesteps

STEPS = 1000
DENSITY = st.lists(st.floats(0.1, 30), min_size=BINS, max_size=BINS)


@pytest.mark.heavy
@given(DENSITY)
def test_weights_bring_any_density_back_to_the_mean_over_the_schedule(sizes: list[float]) -> None:
    size = torch.tensor(sizes, dtype=torch.float64)
    density = EVEN_SHARE + (1 - EVEN_SHARE) * size / size.mean()
    rows = 20_000
    timesteps, weights = weighted_timesteps((torch.arange(rows) + 0.5) / rows, density, STEPS)
    assert timesteps.min() >= 0 and timesteps.max() < STEPS
    for value in (torch.ones(STEPS), torch.arange(STEPS) / STEPS, (torch.arange(STEPS) > 0.9 * STEPS).float()):
        assert (weights * value[timesteps]).mean().item() == pytest.approx(value.mean().item(), abs=5e-3)
    drawn = torch.bincount(timesteps * BINS // STEPS, minlength=BINS) / rows
    np.testing.assert_allclose(drawn, density / BINS, atol=2e-3)
    assert weights.max() <= 1 / EVEN_SHARE


def test_density_follows_the_root_mean_square_and_leaves_no_timestep_out() -> None:
    timesteps = torch.arange(0, STEPS, 5)
    norms = torch.where(timesteps >= 900, 4.0, 1.0)
    norms[::2] *= 0  # half of the rows have no gradient: the mean square halves everywhere
    density = timestep_density(timesteps, norms, STEPS)
    assert density.mean().item() == pytest.approx(1)
    even, rest = density - EVEN_SHARE, density[0] - EVEN_SHARE
    np.testing.assert_allclose(even[:9], rest)
    assert (even[9] / rest).item() == pytest.approx(4, rel=0.3)  # densities are rounded


def test_rounding_errors_of_the_pilot_move_no_timestep() -> None:
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.arange(0, STEPS, 5)
    norms = torch.rand(len(timesteps), generator=generator) * torch.linspace(0.1, 9, len(timesteps))
    quantiles = (torch.arange(5000) + 0.5) / 5000
    drawn = [
        weighted_timesteps(quantiles, timestep_density(timesteps, norms * factor, STEPS), STEPS)[0]
        for factor in (1, 1 + 1e-6 * torch.randn(len(timesteps), generator=generator))
    ]
    assert torch.equal(*drawn)


def test_without_any_gradient_timesteps_stay_even() -> None:
    timesteps = torch.arange(0, STEPS, 5)
    density = timestep_density(timesteps, torch.zeros(len(timesteps)), STEPS)
    quantiles = (torch.arange(50) + 0.5) / 50
    found, weights = weighted_timesteps(quantiles, density, STEPS)
    assert (found - (quantiles * STEPS).long()).abs().max() <= 1  # rounding
    assert torch.equal(weights, torch.ones(50))


def weighted_error(model: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs, targets, weights = batch
    return ((model(inputs) - targets).square().flatten(1).sum(1) * weights.sqrt()).sum()


@pytest.mark.heavy
def test_a_row_of_weight_three_counts_as_three_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 3, bias=False))
    inputs, targets = (torch.randn(20, 5, width, generator=generator) for width in (4, 3))
    weights = torch.tensor([3.0, 1.0] * 10)
    repeated = torch.arange(20).repeat_interleave(weights.long())
    once = TensorDataset(inputs, targets, weights)
    often = TensorDataset(inputs[repeated], targets[repeated], torch.ones(len(repeated)))
    found, expected = (
        fit_fisher("diagonal", layer, ["0"], rows, weighted_error, 8, torch.device("cpu")) for rows in (once, often)
    )
    assert isinstance(found, DiagonalFisher) and isinstance(expected, DiagonalFisher)
    torch.testing.assert_close(found.layers["0"] * 20, expected.layers["0"] * 40, rtol=1e-5, atol=0)
    # The bases differ by the inputs' covariance, which no weight reaches; the trace does not depend on them.
    found, expected = (
        fit_fisher("ekfac", layer, ["0"], rows, weighted_error, 8, torch.device("cpu")) for rows in (once, often)
    )
    assert isinstance(found, EkfacFisher) and isinstance(expected, EkfacFisher)
    traces = [fisher.layers["0"].eigenvalues.sum().item() for fisher in (found, expected)]
    assert traces[0] * 20 == pytest.approx(traces[1] * 40, rel=1e-5)
