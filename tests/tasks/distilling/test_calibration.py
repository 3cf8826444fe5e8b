"""What a head's similarities say of ranks and scores, against truths that are known."""

from __future__ import annotations

import numpy as np
import pytest

from storage_schemas.heads.records import Calibration
from tasks.distilling import calibration
from tasks.distilling.calibration import Pairs, check, fit, interpolated


def drawn_pairs(seed: int, *, noise: float, samples: int = 2000) -> Pairs:
    """A query whose scores are the exponential of its similarities, with noise."""
    rng = np.random.default_rng(seed)
    similarity = rng.normal(size=samples)
    scores = np.exp(similarity + noise * rng.normal(size=samples))
    return Pairs(similarity, similarity[:500], scores)


def test_ranks_are_those_of_the_labels_with_ties_at_the_last() -> None:
    pairs = Pairs(np.array([3.0, 1.0, 2.0, 0.0]), np.array([0.0, 2.0]), np.array([0.5, 0.0, 0.9, 0.0]))
    assert pairs.similarity.tolist() == [3, 2, 1, 0] and pairs.scores.tolist() == [0.5, 0.9, 0, 0]
    assert np.exp(pairs.log_rank) == pytest.approx([2 / 4, 1 / 4, 4 / 4, 4 / 4])
    assert pairs.nearness.tolist() == [2, 1, 0, -1]


def test_scores_and_ranks_of_other_queries_are_met_with_their_errors() -> None:
    found = check(fit([drawn_pairs(seed, noise=0.3) for seed in range(8)]), [drawn_pairs(99, noise=0.3)])
    truth = drawn_pairs(100, noise=0.3)
    score, error = interpolated(found.score, truth.similarity)
    middle = np.abs(truth.similarity) < 1.5
    assert score[middle] == pytest.approx(np.exp(truth.similarity[middle] + 0.3**2 / 2), rel=0.15)
    assert 0.9 < (np.abs(score - truth.scores) < 2 * error).mean() < 0.99
    rank, spread = interpolated(found.rank, truth.nearness)
    assert 0.9 < (np.abs(rank - truth.log_rank) < 2 * spread).mean() < 1
    assert found.rank_explained > 0.3 and found.score_explained > 0.3 and found.covered > 0.8


def test_curves_are_monotone_and_those_of_least_squares() -> None:
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=50).cumsum() + rng.normal(size=50) * 3, rng.integers(1, 9, 50).astype(float)
    expected = scipy.isotonic_regression(values, weights=counts).x
    assert calibration._rising(values, counts) == pytest.approx(expected)
    found = fit([drawn_pairs(seed, noise=2.0) for seed in range(3)])
    assert (np.diff(found.score.x) > 0).all() and (np.diff(found.score.y) >= 0).all()
    assert (np.diff(found.rank.x) > 0).all() and (np.diff(found.rank.y) <= 0).all()


def test_a_head_that_knows_nothing_explains_nothing() -> None:
    rng = np.random.default_rng(3)
    blind = [Pairs(rng.normal(size=500), rng.normal(size=100), rng.normal(size=500)) for _ in range(6)]
    found = check(fit(blind[:4]), blind[4:])
    assert found.rank_explained < calibration.LEAST_EXPLAINED and found.score_explained < calibration.LEAST_EXPLAINED


@pytest.mark.parametrize("several", [[], [Pairs(np.array([0.5]), np.array([0.5]), np.array([1.0]))]])
def test_few_pairs_or_none_are_no_fault(several: list[Pairs]) -> None:
    found = check(fit(several), several)
    assert found == Calibration.model_validate_json(found.model_dump_json())
    assert np.isnan(interpolated(found.score, np.array([0.0]))[0]).all() == (not several)
