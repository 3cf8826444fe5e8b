"""Ranking metrics, vectorised over queries."""

from __future__ import annotations

import torch
from torch import Tensor


def top_mask(scores: Tensor, cutoff: int) -> Tensor:
    """The `cutoff` highest scores of each row as True; (queries, samples) bool. Ties fall to the earlier sample."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :cutoff]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Average precision of each query over its full ranked list.

    Items of equal score share the precision at the end of their tie, as scikit-learn does.

    Args:
        scores: (queries, samples); higher ranks earlier.
        relevant: (queries, samples) bool, at least one True a row.

    Returns:
        (queries,) float64.
    """
    ordered, order = torch.sort(scores, dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order).double()
    samples = scores.shape[1]
    positions = torch.arange(samples)
    tie_ends = torch.ones_like(relevant)
    tie_ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    # The end of each item's tie: the nearest end at or after it, found from the back.
    ends = torch.where(tie_ends, positions, samples - 1).flip(1).cummin(1).values.flip(1)
    precision = hits.cumsum(1) / (positions + 1)
    return (precision.gather(1, ends) * hits).sum(1) / hits.sum(1)


def expected_random_average_precision(samples: int, relevant: int) -> float:
    """Mean average precision of a random order of `samples` items of which `relevant` are positive.

    Source: Bestgen, "Exact expected average precision of the random baseline for system evaluation" (2015).
    """
    harmonic = torch.arange(1, samples + 1, dtype=torch.float64).reciprocal().sum().item()
    if samples == 1:
        return 1.0
    return ((relevant - 1) / (samples - 1) * (samples - harmonic) + harmonic) / samples


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of each row without ties, (queries,) float64."""
    ranks = [torch.argsort(torch.argsort(values, dim=1), dim=1).double() for values in (first, second)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    return (centred[0] * centred[1]).sum(1) / (centred[0].square().sum(1) * centred[1].square().sum(1)).sqrt()
