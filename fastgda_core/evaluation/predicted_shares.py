"""Shares of a picture that no teacher scored: from the order in which a head puts the training samples.

A head gives an order and no scores. What the sample at a rank is paid is taken from queries that the teacher did score:
the mean share, over these queries, of the sample that the head put at this rank. How far that is wrong is measured on
the same queries, each by what the others say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastgda_core.evaluation.shares import Floats, Numbers, QueryShares

GROWTH = 1.25  # ranks are pooled in bins that grow by this factor: the first ranks alone, late ones by thousands


@dataclass(frozen=True)
class RankCurve:
    """What a query's influence is at each rank of a head, by scored queries.

    share: mean share of the sample at each rank, (depth,); later ranks have `rest` together, all the same.
    variance: of that share around the mean, (depth,).
    """

    share: Floats
    variance: Floats
    rest: float

    def payees(self, payee: Numbers, samples: Numbers) -> Floats:
        """Return the predicted share of each payee, (payees,).

        Args:
            payee: number of the payee of the sample at each rank, (depth,).
            samples: how many samples each payee has, (payees,).
        """
        first = np.bincount(payee, self.share, len(samples))
        later = samples - np.bincount(payee, minlength=len(samples))
        return first + (self.rest * later / later.sum() if later.any() else 0.0)


def rank_curve(shares: Floats) -> RankCurve:
    """Average over queries.

    Args:
        shares: of the sample at each rank of the head, in the influence on each query, (queries, depth).
    """
    edges = _edges(shares.shape[1])
    widths = np.diff(edges)
    mean = np.add.reduceat(shares.mean(0), edges[:-1]) / widths
    share = mean.repeat(widths)
    around = np.add.reduceat(((shares - share) ** 2).mean(0), edges[:-1]) / widths
    return RankCurve(share, around.repeat(widths), max(1 - float(share.sum()), 0.0))


def _edges(depth: int) -> Numbers:
    edges = [0]
    while edges[-1] < depth:
        edges.append(min(max(edges[-1] + 1, int(edges[-1] * GROWTH)), depth))
    return np.array(edges)


def predicted_shares(
    scored: Floats, scored_payee: Numbers, truth: Floats, payee: Numbers, samples: Numbers
) -> QueryShares:
    """Predict the shares of a picture from a head's order of the samples.

    The error of a payee is the larger of two: how far such predictions are off for this payee on the scored queries,
    and the spread of single samples at these ranks, as a payee that was never near a scored query can be near this one.

    Args:
        scored: share of the sample at each rank of the head in the influence on each scored query, (queries, depth), at
            least three queries.
        scored_payee: number of the payee of that sample, (queries, depth).
        truth: each payee's share of each scored query, (queries, payees).
        payee: of the sample at each rank for the picture, (depth,).
        samples: how many samples each payee has, (payees,).
    """
    curve = rank_curve(scored)
    share = curve.payees(payee, samples)
    squares = np.zeros(len(samples))
    for number in range(len(scored)):
        others = rank_curve(np.delete(scored, number, 0)).payees(scored_payee[number], samples)
        squares += (others - truth[number]) ** 2
    alone = np.bincount(payee, curve.variance, len(samples))
    error = np.sqrt(np.maximum(squares / len(scored), alone))
    return QueryShares(np.stack([share] * 3), np.stack([error] * 3), samples / samples.sum(), len(scored) - 1)
