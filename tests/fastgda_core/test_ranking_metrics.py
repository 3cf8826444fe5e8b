from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from fastgda_core.evaluation.ranking_metrics import (
    average_precision,
    expected_random_average_precision,
    spearman,
    top_mask,
)


def precision_at_hits(hits: tuple[int, ...]) -> float:
    """Average precision of one ranked list of 0/1, by its definition."""
    return sum(sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit) / sum(hits)


@pytest.mark.parametrize("levels", [None, 4], ids=["distinct scores", "many ties"])
def test_average_precision_equals_scikit_learn(levels: int | None) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(500, 60)) if levels is None else rng.integers(levels, size=(500, 60)).astype(float)
    relevant = rng.random((500, 60)) < rng.uniform(0.05, 0.9, size=(500, 1))
    relevant[np.arange(500), rng.integers(60, size=500)] = True
    expected = [average_precision_score(truth, score) for truth, score in zip(relevant, scores, strict=True)]
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(relevant))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)


def test_items_left_out_with_minus_infinity_rank_last() -> None:
    scores = torch.tensor([[0.5, -torch.inf, 0.1, -torch.inf]])
    relevant = torch.tensor([[False, False, True, False]])
    assert average_precision(scores, relevant).item() == 0.5


@pytest.mark.parametrize(("samples", "relevant"), [(n, r) for n in range(1, 7) for r in range(1, n + 1)])
def test_expected_random_average_precision_equals_the_mean_over_all_orders(samples: int, relevant: int) -> None:
    marks = [1] * relevant + [0] * (samples - relevant)
    values = [precision_at_hits(order) for order in itertools.permutations(marks)]
    assert expected_random_average_precision(samples, relevant) == pytest.approx(sum(values) / len(values), abs=1e-12)


@pytest.mark.parametrize(("samples", "relevant"), [(200, 1), (200, 20), (300, 150)])
def test_expected_random_average_precision_equals_a_monte_carlo_mean(samples: int, relevant: int) -> None:
    rng = np.random.default_rng(1)
    hits = rng.permuted(np.tile(np.arange(samples) < relevant, (4000, 1)), axis=1)
    precision = hits.cumsum(1) / np.arange(1, samples + 1)
    values = (precision * hits).sum(1) / relevant
    standard_error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - expected_random_average_precision(samples, relevant)) < 4 * standard_error


def test_spearman_equals_scipy() -> None:
    rng = np.random.default_rng(2)
    first = rng.normal(size=(20, 80))
    second = np.linspace(-1, 1, 20)[:, None] * first + rng.normal(size=(20, 80)) * 0.3
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    found = spearman(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("cutoff", [1, 7, 30])
def test_top_mask_picks_exactly_the_highest(cutoff: int) -> None:
    scores = np.random.default_rng(3).normal(size=(15, 30))
    mask = top_mask(torch.from_numpy(scores), cutoff).numpy()
    for row, chosen in zip(scores, mask, strict=True):
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-row)[:cutoff])


def test_top_mask_gives_ties_to_the_earlier_sample_and_keeps_the_count() -> None:
    mask = top_mask(torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert mask.tolist() == [[True, True, False, False], [True, True, False, False]]
