"""Batches of labelled (query, training sample) pairs in which each query and each sample is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


@dataclass(frozen=True)
class RankPairs:
    """All labelled pairs of a split, 12 bytes each.

    key: query * samples + sample, ascending, (pairs,) int64; label: what is learned, rank labels or standardised
    scores, (pairs,) float32; outside: label of a query's non-candidates, (queries,) float32; samples: their number.
    """

    key: Tensor
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
        """Pairs in any order, (pairs,) each, no pair twice; non-candidates get label 1 unless `outside` says otherwise.

        Raises:
            ValueError: a pair occurs twice.
        """
        key, order = torch.sort(query.long() * samples + sample)
        if len(key) and not bool((key[1:] > key[:-1]).all()):
            raise ValueError("a (query, sample) pair occurs twice")
        return cls(key, label[order].float(), torch.ones(queries) if outside is None else outside.float(), samples)

    def __len__(self) -> int:
        return len(self.key)

    @property
    def queries(self) -> int:
        return len(self.outside)

    def to(self, device: torch.device) -> RankPairs:
        return RankPairs(self.key.to(device), self.label.to(device), self.outside.to(device), self.samples)

    def contain(self, query: Tensor, sample: Tensor) -> Tensor:
        """Whether each (query, sample) is one of the pairs, (n,) bool."""
        key = query * self.samples + sample
        place = torch.searchsorted(self.key, key).clamp_(max=len(self.key) - 1)
        return self.key[place] == key


@dataclass  # not frozen: Lightning moves batches to the device field by field
class RankBatch:
    """Distinct queries of a batch, (q,), training samples, (s,), and the label of each pair, (q, s), NaN where none."""

    queries: Tensor
    samples: Tensor
    label: Tensor


class RankBatches(IterableDataset[RankBatch]):
    """One epoch: every pair once, about `batch_size` pairs a batch, batches in random order.

    Encoding is where the time goes, so a batch should hold many pairs of few items: `batch_size` pairs of a random
    group of queries and a random group of samples, the groups of such sizes that the batch is about square. With
    probability `outside_probability` a pair is replaced by one of the same query outside its candidates, a uniform draw
    that the batch's queries share (design section 4, "Rank label"); a query that has every sample as a candidate keeps
    its own.

    An epoch's batches depend on the seed and the number of the epoch alone.

    Args:
        pairs: on the device where batches are to be drawn.
        batch_size: pairs.
        outside_probability: in [0, 1].
        seed: of all draws.
        epoch: number of the epoch that begins.
        rank, world: this process makes every `world`-th batch, from the `rank`-th on; up to `world` - 1 are left out.
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
        device = pairs.key.device
        bounds = torch.arange(pairs.queries + 1, device=device) * pairs.samples
        self.first_pair = torch.searchsorted(pairs.key, bounds)
        count = self.first_pair.diff()
        self.labelled = count.nonzero().squeeze(1)
        self.has_outsiders = count < pairs.samples
        density = len(pairs) / max(1, len(self.labelled) * pairs.samples)
        self.group = max(1, min(len(self.labelled), round((batch_size / max(density, 1e-9)) ** 0.5)))

    def __iter__(self) -> Iterator[RankBatch]:
        generator = torch.Generator(self.pairs.key.device).manual_seed(self.seed * 100_003 + self.epoch())
        order, ends = self._epoch_order(generator)
        numbers = torch.randperm(len(ends) - 1, generator=generator, device=generator.device).tolist()
        if self.world > 1:  # as many batches for each process, and draws of its own
            numbers = numbers[self.rank : len(numbers) - len(numbers) % self.world : self.world]
            generator.manual_seed(generator.initial_seed() + 1 + self.rank)
        for number in numbers:
            yield self._batch(order[ends[number] : ends[number + 1]].long(), generator)

    def _epoch_order(self, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """Pairs in an order in which batches are consecutive, (pairs,), and where each batch ends."""
        pairs, device = self.pairs, self.pairs.key.device
        shuffled = self.labelled[torch.randperm(len(self.labelled), generator=generator, device=device)]
        order = torch.empty(len(pairs), dtype=torch.int32 if len(pairs) < 2**31 else torch.int64, device=device)
        ends = [0]
        for members in torch.split(shuffled, self.group):
            counts = self.first_pair[members + 1] - self.first_pair[members]
            starts = torch.repeat_interleave(self.first_pair[members] - (torch.cumsum(counts, 0) - counts), counts)
            rows = starts + torch.arange(len(starts), device=device)
            place = torch.randperm(pairs.samples, generator=generator, device=device)
            rows = rows[torch.argsort(place[pairs.key[rows] % pairs.samples])]
            first, last = ends[-1], ends[-1] + len(rows)
            order[first:last] = rows
            ends += [*range(first + self.batch_size, last, self.batch_size), last]
        return order, ends

    def _batch(self, rows: Tensor, generator: torch.Generator) -> RankBatch:
        key = self.pairs.key[rows]
        query, sample, label = key // self.pairs.samples, key % self.pairs.samples, self.pairs.label[rows]
        if self.outside_probability > 0:
            replace = torch.rand(len(rows), generator=generator, device=key.device) < self.outside_probability
            replace &= self.has_outsiders[query]
            drawn_for, drawn = self._outsiders(query[replace], generator)
            query, sample = torch.cat([query[~replace], drawn_for]), torch.cat([sample[~replace], drawn])
            label = torch.cat([label[~replace], self.pairs.outside[drawn_for]])
        queries, row = torch.unique(query, return_inverse=True)
        samples, column = torch.unique(sample, return_inverse=True)
        labels = torch.full((len(queries), len(samples)), torch.nan, device=key.device)
        labels[row, column] = label
        return RankBatch(queries, samples, labels)

    def _outsiders(self, query: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A non-candidate for each entry of `query`, (n,): the queries again, in another order, and the samples.

        The k-th draw of each query is the same sample, so that few samples have to be encoded; draws that turn out to
        be candidates are repeated.
        """
        found_for, found = [query[:0]], [query[:0]]
        query = torch.sort(query).values
        while len(query):
            _, counts = torch.unique_consecutive(query, return_counts=True)
            first = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
            number = torch.arange(len(query), device=query.device) - first
            shape = (int(counts.max()),)
            pool = torch.randint(self.pairs.samples, shape, generator=generator, device=query.device)
            inside = self.pairs.contain(query, pool[number])
            found_for.append(query[~inside])
            found.append(pool[number][~inside])
            query = query[inside]
        return torch.cat(found_for), torch.cat(found)
