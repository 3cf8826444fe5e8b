"""The twin test: a teacher has to rank a query's twin first. It needs no retraining.

A query generated from a training sample's caption was made, above all, by that sample; and a training image taken as
the query is its own most influential sample. That sample is the query's twin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST = 0.01  # a twin among this share of the candidates is found
PASSES = 0.9  # share of twins found that passes


def first_places(candidates: int) -> int:
    """Return how many places of a ranking are the first 1 %, at least one."""
    return max(1, math.ceil(FIRST * candidates))


@dataclass(frozen=True)
class TwinTest:
    """Ranks of some queries' twins, 1 = the highest score, and how many places of each ranking count as first.

    The worst rank is reported beside the share, never a mean or a median: a gradient of random sign puts half of the
    twins first and half of them last.
    """

    ranks: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def found(self) -> int:
        """Number of twins among the first places."""
        return sum(rank <= first for rank, first in zip(self.ranks, self.places, strict=True))

    @property
    def share(self) -> float:
        return self.found / len(self.ranks)

    @property
    def worst(self) -> int:
        return max(self.ranks)

    @property
    def passed(self) -> bool:
        return self.share >= PASSES
