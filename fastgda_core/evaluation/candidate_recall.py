"""Which share of the teacher's first L samples is among a query's K nearest, from which its candidates are taken.

Of all N samples the K nearest are scored, or a random share of them, and of the N - K others all or a random sample.
Where everything is scored the share is counted. Else the others are counted by weight, (N - K) / scored: an estimate
of how many of them are above the j-th of the nearest is unbiased for every j, so that estimates of several queries can
be averaged before they are used; how many of the first L are nearest is then that j with j + others above it = L. One
query cannot tell: of 400 million samples a random million has one in 400, and the first 1,000 have two or three of it.
As j is the same for all queries, those that miss much count more than in a mean of shares: the estimate errs to the low
side where queries differ, by 0.03 at L = 100 on the demo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
_RESAMPLED = 200


@dataclass(frozen=True, eq=False)
class ScoredQuery:
    """One query's scores, in any order.

    inside: of samples drawn from its `nearest` ones, (n,); outside: of samples drawn from the `others`, (m,).
    """

    inside: Scores
    nearest: int
    outside: Scores
    others: int

    @property
    def is_whole(self) -> bool:
        return len(self.inside) >= self.nearest and len(self.outside) >= self.others

    def share(self, cutoff: int) -> float:
        """Return the share of the first `cutoff` that is nearest, where all are scored; of a tie the nearest first."""
        both = np.concatenate([self.inside, self.outside])
        first = np.lexsort((np.arange(len(both)), -both))[:cutoff]
        return float(np.mean(first < len(self.inside)))

    def others_above(self, cutoff: int) -> Scores:
        """Return how many others are above the j-th of the nearest, j = 1 to `cutoff` or `nearest`, estimated."""
        if not len(self.inside) or not len(self.outside):
            return np.zeros(min(cutoff, self.nearest))
        inside, outside = -np.sort(-self.inside), np.sort(self.outside)
        j = np.arange(1, min(cutoff, self.nearest) + 1)
        place = np.ceil(j * len(inside) / self.nearest).astype(int)  # the j-th of the nearest, among those scored
        above = len(outside) - np.searchsorted(outside, inside[place - 1], side="right")
        return above * (self.others / len(outside))


@dataclass(frozen=True)
class CandidateRecall:
    """Mean over queries, its standard error, and each query's own where everything was scored; else none."""

    value: float
    error: float
    each: tuple[float, ...] = ()


def candidate_recall(queries: Sequence[ScoredQuery], cutoff: int) -> CandidateRecall:
    """Return the share of the teacher's first `cutoff` samples that is among the nearest.

    Args:
        queries: at least one.
    """
    if all(query.is_whole for query in queries):
        each = [query.share(cutoff) for query in queries]
        error = float(np.std(each, ddof=1) / len(each) ** 0.5) if len(each) > 1 else 0.0
        return CandidateRecall(float(np.mean(each)), error, tuple(each))
    length = min(len(query.others_above(cutoff)) for query in queries)
    above = np.stack([query.others_above(cutoff)[:length] for query in queries])
    draw = np.random.default_rng(0)
    again = [_recall(above[draw.integers(len(above), size=len(above))].mean(0), cutoff) for _ in range(_RESAMPLED)]
    # Queries drawn again say nothing of the hit that did not happen: one more is what cannot be told from none.
    one = np.mean([query.others / max(1, len(query.outside)) for query in queries]) / len(queries) / cutoff
    return CandidateRecall(_recall(above.mean(0), cutoff), min(1.0, float(np.hypot(np.std(again), one))))


def _recall(above: Scores, cutoff: int) -> float:
    """Return j / cutoff where j + others above the j-th = cutoff, between whole j by a straight line."""
    j = np.arange(len(above) + 1)
    return float(np.interp(cutoff, j + np.concatenate([[0.0], above]), j)) / cutoff
