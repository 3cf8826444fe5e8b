"""Shares from a head's order alone, against the influence that the order was made from."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgda_core.evaluation.predicted_shares import predicted_shares, rank_curve
from fastgda_core.evaluation.shares import Period, Sums

SAMPLES, PAYEES = 400, 5
Rows = NDArray[np.float64]


def world(queries: int, seed: int) -> tuple[Rows, NDArray[np.int64]]:
    """Influence by rank of a head, which has noise, and the payee of the sample there, (queries, samples) each."""
    generator = np.random.default_rng(seed)
    favourite = generator.integers(PAYEES, size=queries)
    payee = np.arange(SAMPLES) % PAYEES
    influence = generator.gamma(0.5, size=(queries, SAMPLES)) * np.where(payee == favourite[:, None], 3.0, 1.0)
    order = np.argsort(-influence * generator.lognormal(0, 0.5, size=influence.shape), axis=1)
    shares = np.take_along_axis(influence / influence.sum(1, keepdims=True), order, axis=1)
    return shares, payee[order]


def test_a_curve_is_the_mean_at_each_rank_and_pools_late_ones() -> None:
    shares, _ = world(20, 0)
    curve = rank_curve(shares)
    assert np.allclose(curve.share[:7], shares.mean(0)[:7]) and len(set(curve.share[-40:].tolist())) <= 2
    assert np.isclose(curve.share.sum(), 1) and curve.rest == pytest.approx(0, abs=1e-12)
    assert np.allclose(curve.variance[:7], shares.var(0)[:7])
    short = rank_curve(shares[:, :100])
    assert short.rest == pytest.approx(1 - shares[:, :100].sum(1).mean())


@pytest.mark.parametrize("depth", [SAMPLES, 60])
def test_predictions_add_up_and_their_intervals_hold_the_truth(depth: int) -> None:
    counts = np.full(PAYEES, SAMPLES // PAYEES)
    scored, scored_payee = world(30, 1)
    asked, asked_payee = world(200, 2)
    known = np.stack([np.bincount(payee, share, PAYEES) for share, payee in zip(scored, scored_payee, strict=True)])
    held, off, errors = [], [], []
    for shares, payee in zip(asked, asked_payee, strict=True):
        truth = np.bincount(payee, shares, PAYEES)
        found = predicted_shares(scored[:, :depth], scored_payee[:, :depth], known, payee[:depth], counts)
        period = Period(PAYEES)
        nothing = np.full(PAYEES, np.nan)
        period.add(Sums(np.arange(PAYEES), counts, found.share, nothing, nothing), found)
        whole = period.shares()
        assert whole.share.sum() == pytest.approx(1)
        held.append(((whole.low <= truth) & (truth <= whole.high)).all())
        off.append((found.share - truth) ** 2)
        errors.append(found.standard_error**2)
    assert np.mean(held) >= 0.95 - 2 * np.sqrt(0.05 * 0.95 / len(held))
    assert 0.8 < np.mean(errors) / np.mean(off) < 2
    assert (
        np.mean(off)
        < np.mean([(np.bincount(p, s, PAYEES) - 0.2) ** 2 for s, p in zip(asked, asked_payee, strict=True)]) / 2
    )
