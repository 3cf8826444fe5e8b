"""Batches of (query, training sample, rank label) pairs in which each item is encoded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


@dataclass(frozen=True)
class RankPairs:
    """All labelled pairs of a split.

    query: row of the query, (pairs,); sample: row of the training sample, (pairs,); label: pi in (0, 1], (pairs,).
    """

    query: Tensor
    sample: Tensor
    label: Tensor


@dataclass  # not frozen: Lightning moves batches to the device field by field
class RankBatch:
    """Distinct training samples of the batch, and for each pair its query row, sample position and label."""

    samples: Tensor
    query: Tensor
    position: Tensor
    label: Tensor


class RankBatches(IterableDataset[RankBatch]):
    """One epoch: training samples in random order, each with all its queries, about `batch_size` pairs a batch.

    Grouping by training sample keeps the number of distinct images far below the number of pairs, which is where
    the time goes. With probability `outside_probability` a pair's sample is replaced by one outside its query's
    candidates, with label 1 (design section 4, "Rank label"); a query that has every sample as a
    candidate keeps its own.
    """

    def __init__(self, pairs: RankPairs, samples: int, batch_size: int, outside_probability: float, seed: int) -> None:
        self.batch_size = batch_size
        self.samples = samples
        self.outside_probability = outside_probability
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.argsort(pairs.sample, stable=True)
        self.pairs = RankPairs(pairs.query[order], pairs.sample[order], pairs.label[order])
        self.pairs_of = torch.bincount(self.pairs.sample, minlength=samples)
        self.first_pair = torch.cumsum(self.pairs_of, 0) - self.pairs_of
        self.is_candidate = torch.zeros(int(pairs.query.max()) + 1, samples, dtype=torch.bool)
        self.is_candidate[pairs.query, pairs.sample] = True
        self.has_outsiders = ~self.is_candidate.all(dim=1)

    def __iter__(self) -> Iterator[RankBatch]:
        shuffled = torch.randperm(self.samples, generator=self.generator)
        shuffled = shuffled[self.pairs_of[shuffled] > 0]
        batch_of = (torch.cumsum(self.pairs_of[shuffled], 0) - 1) // self.batch_size
        for members in torch.split(shuffled, torch.bincount(batch_of).tolist()):
            if len(members):
                yield self._batch(members)

    def _batch(self, members: Tensor) -> RankBatch:
        counts = self.pairs_of[members]
        starts = torch.repeat_interleave(self.first_pair[members] - (torch.cumsum(counts, 0) - counts), counts)
        rows = starts + torch.arange(len(starts))
        query, sample, label = self.pairs.query[rows], self.pairs.sample[rows], self.pairs.label[rows].clone()
        replace = torch.rand(len(rows), generator=self.generator) < self.outside_probability
        replace &= self.has_outsiders[query]
        label[replace] = 1.0
        redraw = replace.nonzero().squeeze(1)
        while len(redraw):
            sample[redraw] = torch.randint(self.samples, (len(redraw),), generator=self.generator)
            redraw = redraw[self.is_candidate[query[redraw], sample[redraw]]]
        distinct, position = torch.unique(sample, return_inverse=True)
        return RankBatch(distinct, query, position, label)
