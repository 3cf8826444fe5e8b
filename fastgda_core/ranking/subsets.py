"""Fewer queries or candidates to learn from, as if the teacher had scored no others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgda_core.ranking.batches import RankPairs, first_pairs, places


def thin(pairs: RankPairs, priority: Tensor, share: float, queries: Tensor | None = None, *, ranked: bool) -> RankPairs:
    """Keep the share of each query's candidates that has the highest priority.

    Args:
        pairs: all that there are.
        priority: (pairs,); random for M of K candidates, a similarity for the nearest.
        share: in (0, 1]; at least one candidate of a query is kept.
        queries: numbers of the queries that are kept; None: all.
        ranked: labels are rank labels. Those that are kept are ranked anew among themselves, pi = rank / M. A label of
            the last rank, pi = 1, is kept as it is: samples that are tied there stay tied.
    """
    query = pairs.query
    order = torch.argsort(priority, descending=True)
    order = order[torch.argsort(query[order], stable=True)]
    place, count = places(query)
    chosen = place < torch.clamp((count * share).ceil(), min=1)
    if queries is not None:
        chosen &= torch.isin(query, queries)
    kept = torch.sort(order[chosen]).values
    query, label = query[kept], pairs.label[kept]
    if ranked:
        order = torch.argsort(label)
        order = order[torch.argsort(query[order], stable=True)]
        place, count = places(query)
        among_kept = torch.empty_like(label)
        among_kept[order] = ((place + 1) / count).float()
        label = torch.where(label == 1, label, among_kept)
    first = first_pairs(torch.bincount(query, minlength=pairs.queries))
    return RankPairs(first, pairs.sample[kept], label, pairs.outside, pairs.samples)


def random_priority(pairs: RankPairs, seed: int) -> Tensor:
    """Return a priority for `thin` that draws candidates at random, (pairs,)."""
    return torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed))


def some_queries(queries: Tensor, share: float, seed: int) -> Tensor:
    """Draw a share of the queries at random, at least one."""
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))
    return queries[order[: max(1, math.ceil(share * len(queries)))]]
