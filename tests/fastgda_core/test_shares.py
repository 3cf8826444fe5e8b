"""Shares of payees against loops, simulated noise and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.shares import (
    LEVEL,
    PAID_BY_NOISE,
    Period,
    Shares,
    quantile,
    query_shares,
    shares_of_groups,
    sums_of,
)

PAYEES = 4
Query = list[tuple[float, int]]  # score and payee of each sample
SCORE = st.floats(-1e3, 1e3).map(lambda score: round(score, 3))
QUERIES = st.lists(st.lists(st.tuples(SCORE, st.integers(0, PAYEES - 1)), min_size=1, max_size=12), max_size=6)


def shares_of(queries: list[Query]) -> Shares:
    period = Period(PAYEES)
    for query in queries:
        scores, payee = (np.array(column) for column in zip(*query, strict=True))
        period.add(sums_of(scores.astype(np.float64), np.full(len(query), np.nan), payee))
    return period.shares()


def pays(queries: list[Query]) -> list[Query]:
    return [query for query in queries if any(score > 0 for score, _ in query)]


@given(QUERIES)
def test_shares_are_the_means_of_what_a_loop_adds_up_and_sum_to_one(queries: list[Query]) -> None:
    paying = pays(queries)
    if not paying:
        with pytest.raises(UsageError, match="nothing to share"):
            shares_of(queries)
        return
    found = shares_of(queries)
    expected, influence = [0.0] * PAYEES, [0.0] * PAYEES
    for query in paying:
        total = math.fsum(max(score, 0) for score, _ in query)
        for score, payee in query:
            expected[payee] += max(score, 0) / total / len(paying)
            influence[payee] += max(score, 0)
    assert np.allclose(found.share, expected, rtol=1e-9, atol=1e-12)
    assert np.allclose(found.influence, influence, rtol=1e-9, atol=1e-9)
    assert math.isclose(found.share.sum(), 1) and math.isclose(found.uniform.sum(), 1)
    assert (found.queries, found.silent) == (len(paying), len(queries) - len(paying))
    assert (found.low >= 0).all() if found.queries > 1 else np.isnan(found.low).all()


@given(QUERIES, QUERIES)
def test_shares_times_queries_of_two_periods_add_up_to_those_of_both(first: list[Query], second: list[Query]) -> None:
    if not pays(first) or not pays(second):
        return
    one, other, both = shares_of(first), shares_of(second), shares_of(first + second)
    paid = one.share * one.queries + other.share * other.queries
    assert np.allclose(both.share * both.queries, paid)
    assert np.allclose(both.influence, one.influence + other.influence)
    assert (both.paid == one.paid + other.paid).all()


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=9), st.integers(1, 20))
def test_a_creator_whose_image_is_there_several_times_has_the_share_that_arithmetic_gives(
    scores: list[float], copies: int
) -> None:
    planted = [(scores[0], 0)] * copies
    found = shares_of([[*planted, *((score, 1) for score in scores[1:])]])
    assert math.isclose(found.share[0], copies * scores[0] / (copies * scores[0] + sum(scores[1:])))


def drawn(truth: NDArray[np.float64], error: float, seed: int) -> NDArray[np.float64]:
    return truth + error * np.random.default_rng(seed).normal(size=truth.shape)


def test_standard_errors_are_the_spread_of_shares_over_noise() -> None:
    payee = np.array([0] * 2 + [1] * 5 + [2] * 30)
    truth = np.random.default_rng(0).uniform(3, 9, len(payee))
    found = [query_shares(sums_of(drawn(truth, 1, seed), np.ones(len(payee)), payee)) for seed in range(4000)]
    spread = np.std([each.share for each in found], axis=0)
    assert np.allclose(np.mean([each.standard_error for each in found], axis=0), spread, rtol=0.05)


def test_standard_errors_are_not_too_small_where_scores_are_lost_in_noise() -> None:
    payee = np.array([0] * 10 + [1] * 20 + [2] * 200)
    truth = np.where(payee == 0, 0.5, 0.0)
    found = [query_shares(sums_of(drawn(truth, 1, seed), np.ones(len(payee)), payee)) for seed in range(2000)]
    ratio = np.mean([each.standard_error for each in found], axis=0) / np.std([each.share for each in found], axis=0)
    assert (ratio > 0.97).all() and (ratio < 1.3).all()


@given(st.floats(-4, 4))
def test_variance_of_a_positive_part_is_bounded_from_above(score: float) -> None:
    sums = sums_of(np.array([score]), np.ones(1), np.zeros(1, np.int64))
    below, density = stats.norm.cdf(score), stats.norm.pdf(score)
    exact = (score**2 + 1) * below + score * density - (score * below + density) ** 2
    assert 0.99 * exact <= sums.variance[0] <= exact + 0.18
    assert math.isclose(PAID_BY_NOISE, density if score == 0 else stats.norm.pdf(0))


def test_intervals_hold_the_share_without_noise_and_prove_nobody_who_has_no_influence() -> None:
    """Three payees of whom the last, with most samples, has none: the sum of positive parts pays it all the same."""
    payee = np.array([0] * 5 + [1] * 40 + [2] * 300)
    truth = np.concatenate([np.full(5, 8.0), np.full(40, 2.0), np.zeros(300)])
    true_share = np.bincount(payee, truth) / truth.sum()
    held, proven, naive, signal = [], [], [], []
    for seed in range(300):
        period = Period(3)
        period.add(sums_of(drawn(truth, 1, seed), np.ones(len(payee)), payee))
        found = period.shares()
        held.append((found.low <= true_share) & (true_share <= found.high))
        proven.append(found.proven)
        signal.append(found.signal_to_noise)
        naive.append(found.share - 3 * found.standard_error > 0)
    assert np.all(held, axis=1).mean() >= LEVEL, np.mean(held, axis=0)
    assert np.mean(proven, axis=0)[[0, 1]].min() > 0.99 and np.mean(proven, axis=0)[2] <= 1 - LEVEL
    assert np.median(signal, axis=0)[0] > 8 and np.median(signal, axis=0)[2] < 1
    assert np.mean(naive, axis=0)[2] == 1  # by standard errors alone it would always be "proven"


def test_noise_that_queries_have_in_common_does_not_average_out() -> None:
    payee, truth = np.array([0] * 3 + [1] * 9), np.linspace(3, 8, 12)
    shares, errors = [], []
    for seed in range(2000):
        period, scores = Period(2), drawn(truth, 0.5, seed)
        for scale in (1.0, 2.0, 5.0):  # three queries under one noise plan
            period.add(sums_of(scale * scores, np.full(12, 0.5 * scale), payee))
        found = period.shares()
        shares.append(found.share)
        errors.append(found.noise_error)
    assert np.allclose(np.mean(errors, axis=0), np.std(shares, axis=0), rtol=0.06)


def test_query_error_is_that_of_a_mean_and_is_unknown_of_one_query() -> None:
    generator = np.random.default_rng(1)
    scores, payee = generator.gamma(2.0, size=(7, 10)), np.array([0, 1] * 5)
    found = shares_of([list(zip(each.tolist(), payee.tolist(), strict=True)) for each in scores])
    each = scores[:, ::2].sum(1) / scores.sum(1)
    error = stats.sem(each)
    assert math.isclose(found.query_error[0], error, rel_tol=1e-9)
    assert np.isnan(found.noise_error).all() and math.isclose(found.standard_error[0], error, rel_tol=1e-9)
    reach = stats.t.ppf(1 - 0.05 / 2 / 2, 6) * error  # two payees have samples
    assert math.isclose(found.low[0], each.mean() - reach) and math.isclose(found.high[0], each.mean() + reach)
    assert math.isclose(found.signal_to_noise[0], each.mean() / error)
    alone = shares_of([list(zip(scores[0].tolist(), payee.tolist(), strict=True))])
    assert np.isnan(alone.standard_error).all() and not alone.proven.any()


def test_error_over_groups_is_that_of_noise_that_samples_have_in_common() -> None:
    payee, truth = np.array([0, 0, 1, 1, 1]), np.array([4.0, 5, 3, 6, 2])
    direction = np.array([1.0, 1, -1, -1, -1]) * 0.8
    shares, errors = [], []
    for seed in range(3000):
        common = np.random.default_rng(seed).normal(size=(4, 1))
        _, found = shares_of_groups(truth + common * direction, payee)
        shares.append(found.share[0])
        errors.append(found.standard_error[0] ** 2)
        assert found.freedom == 3
    assert math.isclose(np.mean(errors), np.var(shares), rel_tol=0.1)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 38, 200, 999])
@pytest.mark.parametrize("probability", [0.6, 0.975, 0.9999, 1 - 1e-7])
def test_quantiles_are_scipys(freedom: int, probability: float) -> None:
    assert math.isclose(quantile(probability, freedom), stats.t.ppf(probability, freedom), rel_tol=1e-7)
    assert math.isclose(quantile(probability, 5000), stats.norm.ppf(probability), rel_tol=1e-9)
