"""Ranking metrics, vectorised over queries."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def top_mask(scores: Tensor, cutoff: int) -> Tensor:
    """The `cutoff` highest scores of each row as True; (queries, samples) bool. Ties fall to the earlier sample."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :cutoff]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Average precision of each query over its full ranked list.

    Items of equal score share the precision at the end of their tie, as scikit-learn does. Only scores are sorted, not
    the items: the place of a relevant item is the number of scores that are not below its own.

    Args:
        scores: (queries, samples), not NaN; higher ranks earlier.
        relevant: (queries, samples) bool, at least one True a row.

    Returns:
        (queries,) float64.
    """
    samples = scores.shape[1]
    ascending = _sorted(scores)
    row, column = relevant.nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(relevant))
    # The relevant scores of each query, padded at their low end to the same length.
    order = torch.arange(int(count.max()))
    padding = order >= count[:, None]
    mine = torch.full(padding.shape, -torch.inf, dtype=scores.dtype)
    mine[~padding] = scores[row, column]
    mine = _sorted(mine)
    place = samples - torch.searchsorted(ascending, mine)
    hits = len(order) - torch.searchsorted(mine, mine)
    # A relevant score of minus infinity looks like padding, of which there is so much more in the row.
    hits = torch.where(mine == -torch.inf, count[:, None], hits)
    return (hits / place.double()).masked_fill(padding.flip(1), 0.0).sum(1) / count


def _sorted(scores: Tensor) -> Tensor:
    """Each row in ascending order; on a CPU NumPy sorts several times faster than torch, and lets other threads run."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda rows: np.sort(rows, axis=1), np.array_split(scores.numpy(), threads)))
    return torch.from_numpy(np.concatenate(parts))


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


def kendall(first: Tensor, second: Tensor) -> Tensor:
    """Kendall's tau of each row without ties, (queries,) float64, in n log n.

    The discordant pairs are the inversions of the one order seen from the other. They are counted bit by bit of the
    position, from the highest: among those that agree so far, a 1 that stands before a 0 is an inversion.
    """
    order = torch.argsort(first, dim=1, stable=True)
    place = torch.argsort(torch.argsort(second, dim=1, stable=True), dim=1).gather(1, order)
    queries, n = place.shape
    if n < 2:
        raise ValueError("a rank correlation needs two items or more")
    inversions = torch.zeros(queries, dtype=torch.int64)
    for bit in reversed(range((n - 1).bit_length())):
        ones = (place >> bit) & 1
        group = place >> (bit + 1)
        before = ones.cumsum(1) - ones
        # Ones before the group began do not count: the running number at the first member of each group.
        starts = torch.ones_like(ones, dtype=torch.bool)
        starts[:, 1:] = group[:, 1:] != group[:, :-1]
        at_start = torch.where(starts, before, -1).cummax(1).values
        inversions += ((before - at_start) * (1 - ones)).sum(1)
        place = place.gather(1, torch.argsort(place >> bit, dim=1, stable=True))
    return 1 - 4 * inversions.double() / (n * (n - 1))


def recall(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Share of the relevant items among the `k` highest scores of each row, (queries,) float64."""
    return (top_mask(scores, k) & relevant).sum(1).double() / relevant.sum(1)


def ndcg(scores: Tensor, gains: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain at `k` of each row, (queries,) float64; equal scores keep their order.

    Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques" (2002), with the discount
    1 / log2(1 + place).

    Args:
        scores: (queries, samples); higher ranks earlier.
        gains: (queries, samples), not negative.
    """
    k = min(k, scores.shape[1])
    discount = torch.log2(torch.arange(k, dtype=torch.float64) + 2).reciprocal()
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    best = gains.double().topk(k, dim=1).values
    return (gains.double().gather(1, order) * discount).sum(1) / (best * discount).sum(1)


def agreement(
    teacher: Tensor, ranking: Tensor, cutoffs: Sequence[int], share: float = 1.0
) -> dict[tuple[str, int], Tensor]:
    """How far a ranking is the teacher's, by (measure, cutoff), (queries,) float64 each.

    "spearman" and "kendall" have the cutoff 0. At a cutoff k: "mAP", of the teacher's first k; "ndcg", with gains that
    fall evenly from 1 to 1 / n with the teacher's rank; "overlap", the share that the first k have in common; "recall",
    the share of the teacher's first min(cutoffs) that are among the first k.

    Args:
        teacher, ranking: scores, (queries, n); higher ranks earlier.
        cutoffs: several k, at most n / share.
        share: of the items that the cutoffs are meant for, these are so many: each k stands for so much fewer.
    """
    n = teacher.shape[1]
    places = {cutoff: max(1, round(cutoff * share)) for cutoff in cutoffs}
    first = top_mask(teacher, min(places.values()))
    rank = torch.argsort(torch.argsort(teacher, dim=1, descending=True, stable=True), dim=1)
    gains = (n - rank).double() / n
    found = {("spearman", 0): spearman(teacher, ranking), ("kendall", 0): kendall(teacher, ranking)}
    for cutoff, k in places.items():
        relevant = top_mask(teacher, k)
        found["mAP", cutoff] = average_precision(ranking, relevant)
        found["ndcg", cutoff] = ndcg(ranking, gains, k)
        found["overlap", cutoff] = recall(ranking, relevant, k)
        found["recall", cutoff] = recall(ranking, first, k)
    return found


def expected_random_agreement(n: int, cutoffs: Sequence[int]) -> dict[tuple[str, int], float]:
    """Mean of each measure of `agreement` over all orders of `n` items."""
    found = {("spearman", 0): 0.0, ("kendall", 0): 0.0}
    gains = torch.arange(n, 0, -1, dtype=torch.float64) / n
    for k in cutoffs:
        found["mAP", k] = expected_random_average_precision(n, k)
        discount = torch.log2(torch.arange(k, dtype=torch.float64) + 2).reciprocal()
        found["ndcg", k] = (gains.mean() * discount.sum() / (gains[:k] * discount).sum()).item()
        found["overlap", k] = found["recall", k] = k / n
    return found
