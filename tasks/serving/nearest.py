"""The lists of a fast answer: nearest vectors, most opposed vectors, and images that look alike and rank low."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tasks.distilling.calibration import drawn_samples
from tasks.serving.answers import Hit
from tasks.serving.catalogue import Catalogue
from tasks.serving.fast import FastTier
from tasks.serving.ranked import TIED, Figures, Lists, hits_of
from tasks.serving.settings import Settings
from tasks.serving.untuned import Untuned

LOW = 0.1  # a sample below this share of all ranks low
ALIKE = 200  # nearest images by untuned features, among which such samples are looked for
SYMMETRIC = "this head learned an order alone, so what lowers the image is not named: tier sketch or exact may name it"

Found = tuple[NDArray[np.float32], NDArray[np.int64]]


def nearest_of(
    fast: FastTier,
    catalogue: Catalogue,
    vector: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.bool_] | None,
    found: Found | None = None,
    *,
    opposed: bool = False,
) -> list[Hit]:
    """Return the k samples nearest to one vector, (1, width), as hits.

    Args:
        fast: the tier.
        catalogue: the samples.
        vector: of the question.
        k: how many.
        allowed: whether each sample may be named; None: all may.
        found: what a search to the usual depth found already.
        opposed: those of most negative similarity instead.
    """
    sign = -1 if opposed else 1
    known = {} if found is None else {found[1].shape[1]: found}

    def first(depth: int) -> tuple[NDArray[np.int64], Figures]:
        similarity, train_ids = known.get(depth) or fast.search(sign * vector, depth, allowed)
        kept = train_ids[0] >= 0
        if opposed:
            kept &= similarity[0] > 0
        near = sign * similarity[0][kept]
        return train_ids[0][kept], {"similarity": near, **fast.predictions.of(vector, near)}

    return hits_of(catalogue, first, k)


def with_lowering(
    fast: FastTier,
    catalogue: Catalogue,
    vector: NDArray[np.float32],
    lists: Lists,
    allowed: NDArray[np.bool_] | None,
    settings: Settings,
    *,
    tied: bool,
) -> Lists:
    """Return the lists with those samples that lower the image's likelihood, or with why they are not named."""
    if tied or not fast.can_lower:
        return replace(lists, notes=[*lists.notes, TIED if tied else SYMMETRIC])
    return replace(lists, lowering=nearest_of(fast, catalogue, vector, settings.around, allowed, opposed=True))


def low_and_alike(
    fast: FastTier,
    untuned: Untuned,
    catalogue: Catalogue,
    vector: NDArray[np.float32],
    features: Tensor,
    hits: list[Hit],
    allowed: NDArray[np.bool_] | None,
    settings: Settings,
) -> list[Hit]:
    """Return images that look alike and influence little: near by untuned features, and low by the head.

    Their similarity is the cosine of the features, their predicted rank the share of samples that are nearer by the
    head, of those that are drawn once for all.
    """
    cosine, train_ids = untuned.nearest(features, ALIKE, allowed)
    named = [train_id for hit in hits for train_id in (hit.train_id, *hit.duplicates)]
    kept = (train_ids >= 0) & (cosine > 0) & ~np.isin(train_ids, named)
    cosine, train_ids = cosine[kept], train_ids[kept]
    above = share_above(fast, vector, train_ids)
    low = above > LOW
    cosine, train_ids, above = cosine[low], train_ids[low], above[low]

    def first(depth: int) -> tuple[NDArray[np.int64], Figures]:
        return train_ids[:depth], {"similarity": cosine[:depth], "predicted_rank": above[:depth]}

    return hits_of(catalogue, first, settings.around)


def share_above(fast: FastTier, vector: NDArray[np.float32], train_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return for some samples the share of the drawn ones that are nearer to a vector, (1, width)."""
    drawn = drawn_samples(fast.samples)
    both = np.zeros(fast.samples, np.bool_)
    both[drawn] = both[train_ids] = True
    similarity, found = fast.search(vector, int(both.sum()), both)
    by_sample = np.full(fast.samples, -np.inf)
    by_sample[found[0][found[0] >= 0]] = similarity[0][found[0] >= 0]
    above = np.searchsorted(np.sort(-by_sample[drawn]), -by_sample[train_ids], side="left")
    return above / len(drawn)
