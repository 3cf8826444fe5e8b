"""Batches of labelled (query, training sample) pairs in which each query and each sample is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

PAIRS_AT_ONCE = 8_000_000  # drawn and shuffled together, 12 bytes each


@dataclass(frozen=True)
class RankPairs:
    """All labelled pairs of a split, query by query, 8 bytes each.

    first: number of each query's first pair, and of all pairs, (queries + 1,) int64.
    sample: ascending within a query, (pairs,) int32.
    label: what is learned, rank labels or standardised scores, (pairs,) float32.
    outside: label of a query's non-candidates, (queries,) float32.
    samples: number of training samples.
    """

    first: Tensor
    sample: Tensor
    label: Tensor
    outside: Tensor
    samples: int

    @classmethod
    def of(
        cls,
        query: Tensor,
        sample: Tensor,
        label: Tensor,
        *,
        queries: int,
        samples: int,
        outside: Tensor | None = None,
    ) -> RankPairs:
        """Build from pairs in any order, (pairs,) each; non-candidates get label 1 unless `outside` says otherwise.

        Raises:
            ValueError: a pair occurs twice.
        """
        key, order = torch.sort(query.long() * samples + sample)
        if len(key) and not bool((key[1:] > key[:-1]).all()):
            raise ValueError("a (query, sample) pair occurs twice")
        outside = torch.ones(queries) if outside is None else outside.float()
        first = first_pairs(torch.bincount(query, minlength=queries))
        return cls(first, sample[order].int(), label[order].float(), outside, samples)

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def queries(self) -> int:
        return len(self.outside)

    @property
    def query(self) -> Tensor:
        """Number of each pair's query, (pairs,) int64, made anew."""
        return torch.repeat_interleave(torch.arange(self.queries, device=self.first.device), self.first.diff())

    def to(self, device: torch.device) -> RankPairs:
        first, sample, label, outside = (
            each.to(device) for each in (self.first, self.sample, self.label, self.outside)
        )
        return RankPairs(first, sample, label, outside, self.samples)

    def contain(self, query: Tensor, sample: Tensor) -> Tensor:
        """Return whether each (query, sample) is one of the pairs, (n,) bool; all are bisected together."""
        low, end = self.first[query], self.first[query + 1]
        high = end.clone()
        for _ in range(int(self.first.diff().max()).bit_length()):
            middle = (low + high) // 2
            below = (low < high) & (self.sample[middle.clamp_max(len(self) - 1)] < sample)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, torch.maximum(low, middle))
        return (low < end) & (self.sample[low.clamp_max(len(self) - 1)] == sample)


def first_pairs(count: Tensor) -> Tensor:
    """Return the number of each query's first pair, and of all pairs, (queries + 1,), from the queries' counts."""
    return F.pad(torch.cumsum(count, 0), (1, 0))


def places(group: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each of these sorted numbers, (n,), its place among its equals, from 0, and how many they are."""
    _, counts = torch.unique_consecutive(group, return_counts=True)
    first = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    return torch.arange(len(group), device=group.device) - first, torch.repeat_interleave(counts, counts)


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Return a seed of its own for each epoch of each process of a training."""
    return int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint64)[0])


@dataclass  # not frozen: Lightning moves batches to the device field by field
class RankBatch:
    """Distinct queries of a batch, (q,), training samples, (s,), and the label of each pair, (q, s), NaN where none."""

    queries: Tensor
    samples: Tensor
    label: Tensor


class RankBatches(IterableDataset[RankBatch]):
    """One epoch: every pair once, about `batch_size` pairs a batch, batches in random order.

    Most of the time goes into encoding, so a batch should hold many pairs of few items: `batch_size` pairs of a random
    group of queries and a random group of samples, the groups of such sizes that the batch is about square. With
    probability `outside_probability` a pair is replaced by one of the same query outside its candidates, a uniform draw
    that the batch's queries share (design section 4, "Rank label"); a query that has every sample as a candidate keeps
    its own.

    Several groups of queries, `PAIRS_AT_ONCE`, are drawn at a time and their batches mixed. An epoch's batches depend
    on the seed and the number of the epoch alone.

    Args:
        pairs: on the device where batches are to be drawn.
        batch_size: pairs.
        outside_probability: in [0, 1].
        seed: of all draws.
        epoch: returns the number of the epoch that begins.
        rank, world: this process makes every `world`-th batch, from the `rank`-th on; up to `world` - 1 of the batches
            that are mixed together are left out.
    """

    def __init__(
        self,
        pairs: RankPairs,
        batch_size: int,
        outside_probability: float,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.pairs, self.batch_size, self.outside_probability = pairs, batch_size, outside_probability
        self.seed, self.epoch, self.rank, self.world = seed, epoch, rank, world
        self.count = pairs.first.diff()
        self.labelled = self.count.nonzero().squeeze(1)
        self.has_outsiders = self.count < pairs.samples
        candidates = len(pairs) / max(1, len(self.labelled))
        square = (batch_size * pairs.samples / max(candidates, 1)) ** 0.5
        self.group = max(1, min(len(self.labelled), round(square)))
        self.at_once = max(1, int(PAIRS_AT_ONCE / (self.group * max(candidates, 1))))

    def __iter__(self) -> Iterator[RankBatch]:
        device = self.pairs.first.device
        generator = torch.Generator(device).manual_seed(epoch_seed(self.seed, self.epoch()))
        shuffled = self.labelled[torch.randperm(len(self.labelled), generator=generator, device=device)]
        for several in torch.split(shuffled, self.at_once * self.group):
            groups = [self._draw(members, generator) for members in torch.split(several, self.group)]
            batches = [
                [each[start : start + self.batch_size] for each in drawn]
                for drawn in groups
                for start in range(0, len(drawn[0]), self.batch_size)
            ]
            order = torch.randperm(len(batches), generator=generator, device=device).tolist()
            for number in order[self.rank : len(order) - len(order) % self.world : self.world]:
                yield _batch(*batches[number])

    def _draw(self, members: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw all pairs of a group in an order in which batches are consecutive: query, sample, label, (n,) each."""
        pairs, device = self.pairs, members.device
        counts = self.count[members]
        query = torch.repeat_interleave(members.int(), counts)
        before = torch.cumsum(counts, 0) - counts
        row = torch.repeat_interleave(pairs.first[members] - before, counts) + torch.arange(len(query), device=device)
        place = torch.randperm(pairs.samples, generator=generator, device=device)
        order = torch.argsort(place[pairs.sample[row]], stable=True)
        query, row = query[order], row[order]
        sample, label = pairs.sample[row], pairs.label[row]
        if self.outside_probability > 0:
            replaced = torch.rand(len(row), generator=generator, device=device) < self.outside_probability
            where = (replaced & self.has_outsiders[query]).nonzero().squeeze(1)
            sample[where] = self._outsiders(query[where], where // self.batch_size, generator)
            label[where] = pairs.outside[query[where]]
        return query, sample, label

    def _outsiders(self, query: Tensor, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a non-candidate for each of these pairs, (n,) int32, whose batches are given.

        The k-th draw of each query of a batch is the same sample, so that few samples have to be encoded; draws that
        turn out to be candidates are repeated.
        """
        found = torch.empty_like(query)
        missing = torch.arange(len(query), device=query.device)
        while len(missing):
            group, order = torch.sort(batch[missing] * self.pairs.queries + query[missing], stable=True)
            missing = missing[order]
            number, _ = places(group)
            shape = int(batch.max()) + 1, int(number.max()) + 1
            pool = torch.randint(self.pairs.samples, shape, generator=generator, device=query.device, dtype=torch.int32)
            found[missing] = pool[batch[missing], number]
            missing = missing[self.pairs.contain(query[missing], found[missing])]
        return found


def _batch(query: Tensor, sample: Tensor, label: Tensor) -> RankBatch:
    queries, row = torch.unique(query, return_inverse=True)
    samples, column = torch.unique(sample, return_inverse=True)
    labels = torch.full((len(queries), len(samples)), torch.nan, device=label.device)
    labels[row, column] = label
    return RankBatch(queries, samples, labels)
