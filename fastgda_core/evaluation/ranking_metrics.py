"""Ranking metrics, vectorised over queries; scipy and scikit-learn, with which the tests compare, take one at a time.

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
    """Mark the `cutoff` highest scores of each row, (queries, samples) bool; ties fall to the earlier sample.

    Samples that are tied at the row's lowest score are never marked, nor are non-candidates, whose score is minus
    infinity. A row with fewer other scores has fewer marks, but always one.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :cutoff]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    chosen &= ~(tied_last(scores) | (scores == -torch.inf))
    return chosen.scatter_(1, order[:, :1], True)


def tied_last(scores: Tensor) -> Tensor:
    """Mark the samples that share the lowest score of their row with another, (queries, samples) bool.

    Minus infinity, the score of non-candidates, does not count.
    """
    lowest = scores.masked_fill(scores == -torch.inf, torch.inf).amin(1, keepdim=True)
    last = scores == lowest
    return last & (last.sum(1, keepdim=True) > 1)


def descending_ranks(scores: Tensor) -> Tensor:
    """Return the rank of each sample in its row, 1 = the highest score, (queries, samples) int64.

    Ties fall to the earlier sample. Samples tied at the row's lowest score all have the last rank, as in rank labels.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1) + 1
    candidates = (scores != -torch.inf).sum(1, keepdim=True)
    return torch.where(tied_last(scores), candidates, rank)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Return the average precision of each query over its full ranked list.

    Items of equal score share the precision at the end of their tie, as in scikit-learn. Only scores are sorted, not
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
    # A relevant score of minus infinity looks like padding: `searchsorted` would count the padding, too.
    hits = torch.where(mine == -torch.inf, count[:, None], hits)
    return (hits / place.double()).masked_fill(padding.flip(1), 0.0).sum(1) / count


def _sorted(scores: Tensor) -> Tensor:
    """Sort each row in ascending order; on a CPU NumPy is several times faster than torch, and other threads run."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda rows: np.sort(rows, axis=1), np.array_split(scores.numpy(), threads)))
    return torch.from_numpy(np.concatenate(parts))


def expected_random_average_precision(samples: int, relevant: int) -> float:
    """Return the mean average precision of random orders of `samples` items of which `relevant` are positive.

    Source: Bestgen, "Exact expected average precision of the random baseline for system evaluation" (2015).
    """
    harmonic = torch.arange(1, samples + 1, dtype=torch.float64).reciprocal().sum().item()
    if samples == 1:
        return 1.0
    return ((relevant - 1) / (samples - 1) * (samples - harmonic) + harmonic) / samples


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Return the rank correlation of each row, (queries,) float64; equal values share the mean of their places.

    0 where all values of a row are equal: such a row is no ranking.
    """
    ranks = [(low + high).double() / 2 for low, high in map(_places, (first, second))]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    size = (centred[0].square().sum(1) * centred[1].square().sum(1)).sqrt()
    return torch.where(size > 0, (centred[0] * centred[1]).sum(1) / size, 0.0)


def kendall(first: Tensor, second: Tensor) -> Tensor:
    """Return Kendall's tau-b of each row, (queries,) float64, in n log n; 0 where all values of a row are equal.

    The discordant pairs are the inversions of the second order within the first. They are counted bit by bit of the
    place, from the highest bit: among places that agree in all higher bits, a 1 that stands before a 0 is an inversion.
    Pairs that are tied in either order are no inversions, as the rows are sorted by both.

    Source: Knight, "A computer method for calculating Kendall's tau with ungrouped data" (1966), for the ties.

    Raises:
        ValueError: there are fewer than two items.
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
    """Return the first and last place, from 0, of each value and its equals in its row in ascending order; int64."""
    values = values.contiguous()
    ascending = values.sort(dim=1).values
    return torch.searchsorted(ascending, values), torch.searchsorted(ascending, values, right=True) - 1


def twin_ranks(scores: Tensor, twins: Tensor) -> Tensor:
    """Return the rank of one sample of each row, its twin, (queries,); equal scores count against it.

    Args:
        scores: (queries, samples); higher ranks earlier.
        twins: (queries,), the column of each query's twin.
    """
    return (scores >= scores.gather(1, twins[:, None])).sum(1)


def recall(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Return the share of the relevant items among the `k` highest scores of each row, (queries,) float64."""
    return (top_mask(scores, k) & relevant).sum(1).double() / relevant.sum(1)


def r_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Return the share of each row's n relevant items among its n highest scores, (queries,) float64.

    There precision and recall are the same figure (Buckley and Voorhees, "Evaluating evaluation measure stability",
    2000); over all orders of the items it is n / samples on average.

    Args:
        scores: (queries, samples); higher ranks earlier.
        relevant: (queries, samples) bool, at least one True a row.
    """
    several = zip(scores, relevant, relevant.sum(1).tolist(), strict=True)
    return torch.cat([recall(score[None], truth[None], count) for score, truth, count in several])


def ndcg(scores: Tensor, gains: Tensor, k: int) -> Tensor:
    """Return the normalised discounted cumulative gain at `k` of each row, (queries,) float64.

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
    """Replace each value by the mean over the neighbours whose `ordered` is the same, (queries, samples)."""
    group = torch.zeros(values.shape, dtype=torch.int64)
    group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    sums, counts = torch.zeros_like(values), torch.zeros_like(values)
    sums.scatter_add_(1, group, values)
    counts.scatter_add_(1, group, torch.ones_like(values))
    return (sums / counts).gather(1, group)


def agreement(
    teacher: Tensor, ranking: Tensor, cutoffs: Sequence[int], share: float = 1.0
) -> dict[tuple[str, int], Tensor]:
    """Measure how far a ranking agrees with the teacher's, by (measure, cutoff), (queries,) float64 each.

    "spearman" and "kendall" have the cutoff 0. The other measures have a cutoff k:
    "mAP": the teacher's first k are relevant.
    "ndcg": the gains fall evenly from 1 to 1 / n with the teacher's rank.
    "overlap": the share of the teacher's first k among the ranking's first k.
    "recall": the share of the teacher's first min(cutoffs) among the ranking's first k.
    Samples tied at the teacher's lowest score are never among its first k (`top_mask`) and have the last rank
    (`descending_ranks`).

    Args:
        teacher, ranking: scores, (queries, n); higher ranks earlier.
        cutoffs: several k, at most n / share.
        share: the n items are this share of those that the cutoffs are meant for; each k is multiplied by it.
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
    """Return the gains of `agreement`, (queries, n) float64."""
    n = teacher.shape[1]
    return (n + 1 - descending_ranks(teacher)).double() / n


def expected_random_agreement(teacher: Tensor, cutoffs: Sequence[int]) -> dict[tuple[str, int], float]:
    """Return the mean of each measure of `agreement` with a teacher over all orders of its items.

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
