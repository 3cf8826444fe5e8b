"""The recall of the nearest, counted and estimated, against populations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from fastgda_core.evaluation.candidate_recall import ScoredQuery, candidate_recall

NEAREST, OTHERS, LONG = 400, 40_000, 200


def population(draw: np.random.Generator, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the nearest, which are higher on average, and of all others."""
    return draw.normal(shift, 1.0, NEAREST), draw.normal(0.0, 1.0, OTHERS)


def truth(inside: np.ndarray, outside: np.ndarray, cutoff: int) -> float:
    cut = np.sort(np.concatenate([inside, outside]))[-cutoff]
    return float((inside >= cut).sum() / cutoff)


def test_where_everything_is_scored_the_share_is_counted() -> None:
    draw = np.random.default_rng(0)
    several = [population(draw, shift) for shift in (0.5, 2.0, 5.0)]
    queries = [ScoredQuery(inside, NEAREST, outside, OTHERS) for inside, outside in several]
    for cutoff in (1, 50, LONG, 3 * NEAREST):
        found, expected = candidate_recall(queries, cutoff), [truth(*each, cutoff) for each in several]
        assert found.each == pytest.approx(expected)
        assert found.value == pytest.approx(np.mean(expected))
        assert found.error == pytest.approx(np.std(expected, ddof=1) / 3**0.5)


@pytest.mark.parametrize(("shift", "share", "sampled"), [(2.5, 1.0, 4000), (3.0, 0.5, 2000), (1.5, 0.5, 4000)])
def test_an_estimate_is_right_on_average_and_within_its_errors(shift: float, share: float, sampled: int) -> None:
    draw, found, true = np.random.default_rng(1), [], []
    for _ in range(24):
        several = [population(draw, shift) for _ in range(20)]
        queries = [
            ScoredQuery(
                draw.choice(inside, int(share * NEAREST), replace=False),
                NEAREST,
                draw.choice(outside, sampled, replace=False),
                OTHERS,
            )
            for inside, outside in several
        ]
        found.append(candidate_recall(queries, LONG))
        true.append(np.mean([truth(*each, LONG) for each in several]))
    off = np.array([each.value for each in found]) - true
    errors = np.array([each.error for each in found])
    assert abs(off.mean()) < 0.01
    assert np.mean(np.abs(off) < 2 * errors) >= 0.9
    assert np.median(errors) < 4 * np.std(off), "not wider than need be"


def test_too_small_a_sample_of_the_others_says_that_it_cannot_tell() -> None:
    draw = np.random.default_rng(2)
    inside, outside = population(draw, 1.0)
    assert truth(inside, outside, LONG) < 0.3
    few = candidate_recall([ScoredQuery(inside, NEAREST, outside[:20], OTHERS)], LONG)
    assert few.error == 1.0
