"""Ranking metrics, vectorised over queries.

Samples that share the lowest score of their query are in no order among themselves: a teacher whose negative scores
carry nothing gives all of those the score 0. Those of scipy and scikit-learn take one query at a time, which for mAP is
eleven times as slow; tests compare with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def top_mask(scores: Tensor, cutoff: int) -> Tensor:
    """The `cutoff` highest scores of each row as True; (queries, samples) bool. Ties fall to the earlier sample.

    Samples that are tied at the row's lowest score are never among them, and non-candidates, minus infinity, are not
    either: a row with fewer other scores has fewer True, but always one.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :cutoff]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    chosen &= ~(tied_last(scores) | (scores == -torch.inf))
    return chosen.scatter_(1, order[:, :1], True)


def tied_last(scores: Tensor) -> Tensor:
    """Samples that share the lowest score of their row with another, (queries, samples) bool.

    Minus infinity, the score of non-candidates, does not count.
    """
    lowest = scores.masked_fill(scores == -torch.inf, torch.inf).amin(1, keepdim=True)
    last = scores == lowest
    return last & (last.sum(1, keepdim=True) > 1)


def descending_ranks(scores: Tensor) -> Tensor:
    """Rank of each sample in its row, 1 = the highest score, (queries, samples) int64; ties fall to the earlier sample.

    Those that are tied at the row's lowest score all have the last rank, as in rank labels.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1) + 1
    candidates = (scores != -torch.inf).sum(1, keepdim=True)
    return torch.where(tied_last(scores), candidates, rank)


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
    """Rank correlation of each row, (queries,) float64; equal values share the mean of their places.

    0 where all values of a row are equal, which is no ranking to agree with.
    """
    ranks = [(low + high).double() / 2 for low, high in map(_places, (first, second))]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    size = (centred[0].square().sum(1) * centred[1].square().sum(1)).sqrt()
    return torch.where(size > 0, (centred[0] * centred[1]).sum(1) / size, 0.0)


def kendall(first: Tensor, second: Tensor) -> Tensor:
    """Kendall's tau-b of each row, (queries,) float64, in n log n; 0 where all values of a row are equal.

    The discordant pairs are the inversions of the one order seen from the other. They are counted bit by bit of the
    place, from the highest: among those that agree so far, a 1 that stands before a 0 is an inversion. Pairs that are
    tied in either are no inversions, as the rows are sorted by both.

    Source: Knight, "A computer method for calculating Kendall's tau with ungrouped data" (1966), for the ties.
    """
    queries, n = first.shape
    if n < 2:
        raise ValueError("a rank correlation needs two items or more")
    (low, high), (place, end) = _places(first), _places(second)
    both = low * n + place
    tied_first, tied_second, tied_both = (
        (last - start).sum(1) for start, last in ((low, high), (place, end), _places(both))
    )
    place = place.gather(1, torch.argsort(both, dim=1, stable=True))
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
    # All pairs are counted twice, as (i, j) and (j, i).
    pairs = n * (n - 1)
    surplus = 1 - (4 * inversions + tied_first + tied_second - tied_both).double() / pairs
    untied = ((pairs - tied_first).double() / pairs * ((pairs - tied_second).double() / pairs)).sqrt()
    return torch.where(untied > 0, surplus / untied, 0.0)


def _places(values: Tensor) -> tuple[Tensor, Tensor]:
    """First and last place, from 0, of each value and its equals in its row in ascending order; int64 like `values`."""
    values = values.contiguous()
    ascending = values.sort(dim=1).values
    return torch.searchsorted(ascending, values), torch.searchsorted(ascending, values, right=True) - 1


def twin_ranks(scores: Tensor, twins: Tensor) -> Tensor:
    """Rank of one sample of each row, its twin, (queries,); equal scores count against it.

    Args:
        scores: (queries, samples); higher ranks earlier.
        twins: (queries,), the column of each query's twin.
    """
    return (scores >= scores.gather(1, twins[:, None])).sum(1)


def recall(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Share of the relevant items among the `k` highest scores of each row, (queries,) float64."""
    return (top_mask(scores, k) & relevant).sum(1).double() / relevant.sum(1)


def ndcg(scores: Tensor, gains: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain at `k` of each row, (queries,) float64.

    Items of equal score share the mean of their gains, as in scikit-learn: they may stand in any order.

    Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques" (2002), with the discount
    1 / log2(1 + place).

    Args:
        scores: (queries, samples); higher ranks earlier.
        gains: (queries, samples), not negative.
    """
    k = min(k, scores.shape[1])
    discount = torch.log2(torch.arange(k, dtype=torch.float64) + 2).reciprocal()
    ordered, order = torch.sort(scores, dim=1, descending=True, stable=True)
    gains = gains.double()
    best = gains.topk(k, dim=1).values
    found = _shared(gains.gather(1, order), ordered)[:, :k]
    return (found * discount).sum(1) / (best * discount).sum(1)


def _shared(values: Tensor, ordered: Tensor) -> Tensor:
    """Each value replaced by the mean over the neighbours whose `ordered` is the same, (queries, samples)."""
    group = torch.zeros(values.shape, dtype=torch.int64)
    group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    sums, counts = torch.zeros_like(values), torch.zeros_like(values)
    sums.scatter_add_(1, group, values)
    counts.scatter_add_(1, group, torch.ones_like(values))
    return (sums / counts).gather(1, group)


def agreement(
    teacher: Tensor, ranking: Tensor, cutoffs: Sequence[int], share: float = 1.0
) -> dict[tuple[str, int], Tensor]:
    """How far a ranking is the teacher's, by (measure, cutoff), (queries,) float64 each.

    "spearman" and "kendall" have the cutoff 0. At a cutoff k: "mAP", of the teacher's first k; "ndcg", with gains that
    fall evenly from 1 to 1 / n with the teacher's rank; "overlap", the share of the teacher's first k that are among
    the first k; "recall", the share of its first min(cutoffs) that are. What is tied at the teacher's lowest score is
    never among its first k (`top_mask`) and has the last rank (`descending_ranks`).

    Args:
        teacher, ranking: scores, (queries, n); higher ranks earlier.
        cutoffs: several k, at most n / share.
        share: of the items that the cutoffs are meant for, these are so many: each k stands for so much fewer.
    """
    places = {cutoff: max(1, round(cutoff * share)) for cutoff in cutoffs}
    first = top_mask(teacher, min(places.values()))
    gains = _gains(teacher)
    found = {("spearman", 0): spearman(teacher, ranking), ("kendall", 0): kendall(teacher, ranking)}
    for cutoff, k in places.items():
        relevant = top_mask(teacher, k)
        found["mAP", cutoff] = average_precision(ranking, relevant)
        found["ndcg", cutoff] = ndcg(ranking, gains, k)
        found["overlap", cutoff] = recall(ranking, relevant, k)
        found["recall", cutoff] = recall(ranking, first, k)
    return found


def _gains(teacher: Tensor) -> Tensor:
    """Gains of `agreement`, (queries, n) float64."""
    n = teacher.shape[1]
    return (n + 1 - descending_ranks(teacher)).double() / n


def expected_random_agreement(teacher: Tensor, cutoffs: Sequence[int]) -> dict[tuple[str, int], float]:
    """Mean of each measure of `agreement` with a teacher over all orders of its items.

    Args:
        teacher: scores of one query, (n,).
        cutoffs: several k, at most n.
    """
    n = len(teacher)
    found = {("spearman", 0): 0.0, ("kendall", 0): 0.0}
    gains = _gains(teacher[None])[0].sort(descending=True).values
    for k in cutoffs:
        found["mAP", k] = expected_random_average_precision(n, int(top_mask(teacher[None], k).sum()))
        discount = torch.log2(torch.arange(k, dtype=torch.float64) + 2).reciprocal()
        found["ndcg", k] = (gains.mean() * discount.sum() / (gains[:k] * discount).sum()).item()
        found["overlap", k] = found["recall", k] = k / n
    return found
