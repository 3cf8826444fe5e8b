"""From an order of samples to the lists of an answer, whatever tier made the order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tasks.serving.answers import Column, Hit, Influence
from tasks.serving.catalogue import Catalogue

Figures = dict[str, NDArray[np.floating]]
First = Callable[[int], tuple[NDArray[np.int64], Figures]]
"""Returns the first so many train_ids of an order, fewer where there are no more, and figures of each."""

_DEEPER = 40  # places below the hits, at least, that are looked at for images that look the same
TIED = "this teacher's negative scores carry nothing (teacher.negatives: tie), so what lowers the image is not named"


@dataclass(frozen=True)
class Lists:
    """What a tier found for one question: see `Answer`."""

    hits: list[Hit]
    lowering: list[Hit] = field(default_factory=list)
    similar: list[Hit] = field(default_factory=list)
    influence: Influence | None = None
    notes: list[str] = field(default_factory=list)
    beside: list[Column] = field(default_factory=list)


def depth_for(k: int) -> int:
    """Return how many places are looked at for k hits after those that look the same are folded."""
    return k + max(k, _DEEPER)


def hits_of(catalogue: Catalogue, first: First, k: int) -> list[Hit]:
    """Return the first k hits of an order; samples that look like an earlier one are folded under it."""
    if k == 0:
        return []
    depth = depth_for(k)
    while True:
        train_ids, figures = first(depth)
        folded = catalogue.looks.fold(train_ids, k)
        if len(folded) == k or len(train_ids) < depth:
            break
        depth *= 4  # copies of one picture took all places
    places = np.array([each.place for each in folded], np.int64)
    return catalogue.hits(
        train_ids[places].tolist(),
        duplicates=[each.duplicates for each in folded],
        **{name: [_number(value) for value in values[places].tolist()] for name, values in figures.items()},
    )


@dataclass(frozen=True)
class Scored:
    """Scores of a tier that has them: of all samples, or of some, by ascending train_id.

    errors: standard errors; NaN where they are not known.
    """

    train_ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    errors: NDArray[np.float64]


def lists_of_scores(
    catalogue: Catalogue,
    found: Scored,
    present: NDArray[np.bool_] | None,
    allowed: NDArray[np.bool_] | None,
    k: int,
    around: int,
    *,
    tied: bool,
) -> Lists:
    """Return the lists of a tier by its scores.

    Args:
        found: the scores.
        present: whether each sample is not taken down; None: none is. The influence of all that are there is summed.
        allowed: whether each sample may be named; None: all may.
        k: how many hits.
        around: how many that lower the image's likelihood.
        tied: whether negative scores carry nothing.
    """
    chosen = np.arange(len(found.scores)) if allowed is None else np.flatnonzero(allowed[found.train_ids])
    order = chosen[np.argsort(-found.scores[chosen], kind="stable")]
    negative = order[::-1][found.scores[order[::-1]] < 0]

    def first_of(order: NDArray[np.int64]) -> First:
        def first(depth: int) -> tuple[NDArray[np.int64], Figures]:
            some = order[:depth]
            figures: Figures = {"score": found.scores[some], "standard_error": found.errors[some]}
            return found.train_ids[some], figures

        return first

    hits = hits_of(catalogue, first_of(order), k)
    counted = found.scores if present is None else found.scores[present[found.train_ids]]
    lowering = [] if tied else hits_of(catalogue, first_of(negative), around)
    notes = [TIED] if tied and around else []
    return Lists(hits, lowering, [], _influence(counted, hits), notes)


def _influence(scores: NDArray[np.float64], hits: list[Hit]) -> Influence:
    positive, negative = float(scores[scores > 0].sum()), float(scores[scores < 0].sum())
    held = sum(max(hit.score or 0.0, 0.0) for hit in hits)
    return Influence(len(scores), positive, negative, held / positive if positive else 0.0)


def _number(value: float) -> float | None:
    """Return a figure, None where it is not known: JSON has no NaN."""
    return value if math.isfinite(value) else None
