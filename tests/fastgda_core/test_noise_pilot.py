"""What a pilot expects of noise plans, against plans whose agreement is known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.noise_pilot import (
    LADDER_DRAWS,
    LADDER_TIMESTEPS,
    PILOT_DRAWS,
    PILOT_GRID,
    Rung,
    cheapest,
    ladder,
    pilot_scores,
    pilot_timesteps,
)
from fastgda_core.teachers.scores import first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock
from tests.fastgda_core.blocks import TRAIN_TIMESTEPS, make_block, random_updates

SAMPLES, QUERIES = 4000, 3
ODD, EVEN = 1.5, 2.0  # standard deviations of a draw's noise that an antithetic pair cancels, and of the other


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def noisy(timesteps: int, pairs: int, seed: int) -> Tensor:
    """Noise of antithetic draws: (samples, timesteps, 2 pairs, 1, queries)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SAMPLES, timesteps, pairs, 1, 1, QUERIES)
    odd, even = ODD * drawn(generator, *shape), EVEN * drawn(generator, *shape)
    return torch.cat([even + odd, even - odd], dim=3).flatten(2, 3).view(SAMPLES, timesteps, 2 * pairs, 1, QUERIES)


def rank_correlation(variance: float) -> float:
    """Spearman's of two sums of one standard normal signal and independent normal noise of this variance."""
    return 6 / math.pi * math.asin(1 / (1 + variance) / 2)


def test_expected_agreements_are_those_of_normal_signal_and_noise() -> None:
    """Known in closed form; the ladder's own formula is Pearson's, and off by less than 0.02 in ranks."""
    signal = drawn(torch.Generator().manual_seed(0), SAMPLES, 1, 1, 1, QUERIES)
    rungs = ladder(signal + noisy(PILOT_GRID, PILOT_DRAWS // 2, 1), 1000, tied=False)
    every = {(timesteps, draws) for timesteps in LADDER_TIMESTEPS for draws in LADDER_DRAWS}
    assert {(len(rung.timesteps), rung.draws) for rung in rungs} == every and len(rungs) == len(every)
    assert [rung.forwards for rung in rungs] == sorted(rung.forwards for rung in rungs)
    for rung in rungs:
        noise = EVEN**2 / max(1, rung.draws // 2) + (ODD**2 if rung.draws == 1 else 0)
        expected = rank_correlation(noise / len(rung.timesteps))
        assert rung.agreement == pytest.approx(expected, abs=0.02 + 0.02 * (rung.draws == 1))
        assert rung.of_schedule == pytest.approx(rung.agreement, rel=0.05), "every timestep has the same signal"


def test_a_plan_that_agrees_with_itself_and_not_with_the_schedule_does_not_do() -> None:
    """Without noise, but the signal differs from timestep to timestep: half of its variance is a timestep's own."""
    generator = torch.Generator().manual_seed(2)
    common, own = drawn(generator, SAMPLES, 1, 1, 1, QUERIES), drawn(generator, SAMPLES, PILOT_GRID, 1, 1, QUERIES)
    scores = (common + own).expand(-1, -1, PILOT_DRAWS, -1, -1)
    rungs = ladder(scores, 1000, tied=False)
    mean = (common + own).mean(1, keepdim=True)[:, 0, 0, 0]
    for rung in rungs:
        places = [pilot_timesteps(1000).index(timestep) for timestep in rung.timesteps]
        of_plan = (common + own)[:, places].mean(1)[:, 0, 0]
        by_hand = sum(spearmanr(of_plan[:, q], mean[:, q]).statistic for q in range(QUERIES)) / QUERIES
        assert rung.agreement == pytest.approx(1)
        assert rung.of_schedule == pytest.approx(by_hand**2, abs=1e-6)
    found = cheapest(rungs, 0.9)
    assert found is not None and len(found.timesteps) == 10 and found.draws == 1


def test_of_one_noise_for_all_samples_single_draws_are_not_judged() -> None:
    rungs = ladder(noisy(PILOT_GRID, 2, 1), 1000, tied=False, common=True)
    assert {rung.draws for rung in rungs} == set(LADDER_DRAWS) - {1}


def test_scores_that_are_ties_agree_as_ties() -> None:
    signal = drawn(torch.Generator().manual_seed(0), SAMPLES, 1, 1, 1, QUERIES)
    kept, tied = (ladder(signal + noisy(PILOT_GRID, 2, 1), 1000, tied=each) for each in (False, True))
    first, second = (signal + noisy(1, 1, seed)[:, :, :1] for seed in (8, 9))
    single, of_ties = (
        next(rung.agreement for rung in rungs if (len(rung.timesteps), rung.draws) == (1, 1)) for rungs in (kept, tied)
    )
    ranks = [
        spearmanr(*(each[:, 0, 0, 0, q].clamp_min(0) for each in (first, second))).statistic for q in range(QUERIES)
    ]
    assert of_ties == pytest.approx(sum(ranks) / QUERIES, abs=0.03) and of_ties < single


def test_the_cheapest_rung_that_reaches_the_mark_is_taken_or_none() -> None:
    rungs = [Rung((500,), 1, 0.4, 0.35), Rung((500,), 2, 0.95, 0.6), Rung((250, 750), 1, 0.7, 0.7)]
    assert cheapest(rungs, 0.3) is rungs[0]
    assert cheapest(rungs, 0.65) is rungs[2], "the second agrees with itself alone"
    assert cheapest(rungs, 0.71) is None


@pytest.mark.parametrize("train_timesteps", [7, 20, 39, 100, 1000])
def test_the_grid_lies_in_the_schedule(train_timesteps: int) -> None:
    grid = pilot_timesteps(train_timesteps)
    assert len(grid) == min(PILOT_GRID, train_timesteps) == len(set(grid)) and 0 <= min(grid) <= max(grid)
    assert max(grid) < train_timesteps
    assert abs(grid[0] - (train_timesteps - 1 - grid[-1])) <= 1, "no end of the schedule is left out"


@pytest.mark.heavy
def test_a_pilots_scores_are_those_of_plans_with_one_timestep_and_draw(tiny_model: DiffusionModel) -> None:
    layers = select_layers(tiny_model.denoiser, "cross-attn-kv")
    block: SampleBlock = make_block(tiny_model)
    updates = random_updates(layers, queries=2)
    grid = (20, 70)
    plan = NoisePlan(seed=5, timesteps=grid, draws=PILOT_DRAWS, antithetic=True)
    found = pilot_scores(tiny_model, layers, plan, block, [updates], MicroBatch(64))
    assert found.shape == (len(block.train_ids), 2, PILOT_DRAWS, 1, 2)
    whole = first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(64))
    rounding = 1e-5 * whole.abs().max().item()
    torch.testing.assert_close(found.mean((1, 2))[:, 0].T, whole, rtol=0, atol=rounding)
    for place, timestep in enumerate(grid):
        alone = NoisePlan(seed=5, timesteps=(timestep,), draws=1)  # the first of the antithetic draws
        expected = first_order_scores(tiny_model, layers, alone, block, [updates], MicroBatch(64))
        torch.testing.assert_close(found[:, place, 0, 0].T, expected, rtol=0, atol=2 * rounding)
    assert max(grid) < TRAIN_TIMESTEPS
