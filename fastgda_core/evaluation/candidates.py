"""Rankings of each query's own candidates; their memory does not grow with the number of other samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 16_384
_PADDING = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class CandidateScores:
    """The teacher's scores of some queries, 12 bytes a (query, candidate) pair.

    train_ids: (queries, most candidates of one) int32, ascending within a query, then padding.
    scores: float64 of the same shape; higher = more influential, minus infinity is padding.
    """

    train_ids: Tensor
    scores: Tensor

    @classmethod
    def of(cls, query: Tensor, train_id: Tensor, score: Tensor, *, queries: int) -> CandidateScores:
        """Build from pairs in any order, no pair twice, (pairs,) each; a query without pairs has a row of padding."""
        order = torch.argsort(train_id, stable=True)
        order = order[torch.argsort(query[order], stable=True)]
        query = query[order].long()
        count = torch.bincount(query, minlength=queries)
        place = torch.arange(len(query)) - (torch.cumsum(count, 0) - count)[query]
        shape = queries, int(count.max()) if len(query) else 0
        train_ids = torch.full(shape, _PADDING, dtype=torch.int32)
        scores = torch.full(shape, -torch.inf, dtype=torch.float64)
        train_ids[query, place] = train_id[order].int()
        scores[query, place] = score[order].double()
        return cls(train_ids, scores)

    @property
    def known(self) -> Tensor:
        """True where there is a candidate, (queries, most candidates) bool."""
        return self.train_ids != _PADDING

    @functools.cached_property
    def members(self) -> Tensor:
        """The train_ids that are candidates of any query, ascending, (n,) int32."""
        return torch.unique(self.train_ids[self.known])

    def cosines(self, queries: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the inner product of each query and each of its candidates, float32 of the shape of `scores`.

        Only candidates are encoded, each once.

        Args:
            queries: (queries, d).
            encode: from train_ids, (n,) int64, to their vectors, (n, d).

        Returns:
            On the CPU; minus infinity is padding.
        """
        found = torch.full(self.scores.shape, -torch.inf)
        for block in self.members.split(BLOCK_ROWS):
            similarity = (queries @ encode(block.long()).T).cpu()
            first, last = (end.repeat(len(found), 1) for end in block[[0, -1]])
            starts = torch.searchsorted(self.train_ids, first)
            ends = torch.searchsorted(self.train_ids, last, right=True)
            for row, (start, end) in enumerate(torch.cat([starts, ends], 1).tolist()):
                column = torch.searchsorted(block, self.train_ids[row, start:end].contiguous())
                found[row, start:end] = similarity[row, column]
        return found
