"""Every vector of an exact index, rounded to 8 bits, says which of them can be among the nearest.

FAISS reads two or four bytes of each number, one query after the other. Processors multiply bytes several times as
fast. A product of rounded vectors and a rounded query is wrong by no more than lengths of what the rounding cut off
allow (Cauchy-Schwarz), so that only vectors whose upper bound reaches the k-th exact product have to be looked at
again: what is found is what a scan of all vectors finds. Vectors are turned by a random rotation first, after which
their numbers are about alike in size and 8 bits serve all of them.

Where the nearest are nearly orthogonal to the query, as gradients are, the bound names too many: such queries are given
back.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.search.build import Vectors
from fastgda_core.search.products import is_exact, largest, vectors_of

LEAST = 2**23  # numbers of an index below which a scan is as fast
MORE = 0.5  # times k further vectors are looked at again at once
MOST = 1 / 32  # of all vectors may be looked at again
QUERIES, ROWS = 64, 2**14  # compared at a time: their products stay in the cache
LEVELS = 127
# Of the product of lengths: what single precision loses in the rotation and in exact products.
SLACK = 2e-5


class Rounded:
    """The vectors of an exact index in 8 bits, turned.

    index: a flat one, or one in half precision, of inner products; its vectors are not copied.
    """

    def __init__(self, index: Any) -> None:
        self.index = index  # whose memory the vectors lie in
        self.vectors = vectors_of(index)
        rows, width = self.vectors.shape
        generator = torch.Generator().manual_seed(0)
        self.rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        self.codes = torch.empty(rows, width, dtype=torch.int8)
        self.steps, self.cut_off, self.lengths = torch.empty(3, rows)
        for start in range(0, rows, ROWS):
            some = slice(start, start + ROWS)
            block = self.vectors[some].float()
            self.codes[some], self.steps[some], self.cut_off[some] = _rounded(block @ self.rotation)
            self.lengths[some] = block.norm(dim=1)

    @staticmethod
    def suits(index: Any) -> bool:
        """Return whether an index is exact and large, and this processor multiplies bytes fast."""
        return is_exact(index) and index.ntotal * index.d >= LEAST and bool(torch.cpu._is_vnni_supported())

    def search(
        self, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[Vectors, NDArray[np.int64], NDArray[np.bool_]]:
        """Return the k largest inner products and the places of these vectors, (queries, k) each, in order.

        Args:
            queries: (queries, width).
            k: at most as many as are allowed.
            allowed: by place; None: every vector.

        Returns:
            Also whether each query was asked in vain, (queries,): too many vectors may be among its nearest, and its
            rows hold nothing.
        """
        forbidden = None if allowed is None else torch.from_numpy(~allowed)
        found = [self._search(some, k, forbidden) for some in torch.from_numpy(queries).split(QUERIES)]
        similarity, places, vain = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return similarity, places, vain

    def _search(self, queries: Tensor, k: int, forbidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        bounds = self._bounds(queries, forbidden)
        highest, named = largest(bounds, min(k + math.ceil(MORE * k) + 1, bounds.shape[1]))
        similarity, places = torch.zeros(len(queries), k), torch.zeros(len(queries), k, dtype=torch.int64)
        vain = torch.zeros(len(queries), dtype=torch.bool)
        for number, (query, bound, row, first) in enumerate(zip(queries, bounds, highest, named, strict=True)):
            looked_at, products = first, self._products(query, first, row)
            least = products.topk(k).values[-1]
            # The last bound that was named is as high as any that was not.
            if row[-1] >= least and len(first) < len(bound):
                reach = bound >= least
                if int(reach.sum()) > max(MOST * len(bound), 4 * k):
                    vain[number] = True
                    continue
                looked_at = reach.nonzero().flatten()
                products = self._products(query, looked_at, bound[looked_at])
            found, order = products.topk(k)
            similarity[number], places[number] = found, looked_at[order]
        return similarity, places, vain

    def _products(self, query: Tensor, places: Tensor, bounds: Tensor) -> Tensor:
        """Return exact products with the vectors at some places, -inf where the bound is."""
        return (self.vectors[places].float() @ query).masked_fill(bounds == -torch.inf, -torch.inf)

    def _bounds(self, queries: Tensor, forbidden: Tensor | None) -> Tensor:
        """Return what no inner product exceeds, (queries, vectors); -inf of vectors that are forbidden."""
        codes, steps, cut_off = _rounded(queries @ self.rotation)
        lengths = queries.norm(dim=1, keepdim=True)
        bounds = torch.empty(len(queries), len(self.codes))
        for start in range(0, len(self.codes), ROWS):
            some = slice(start, start + ROWS)
            block = bounds[:, some]
            block.copy_(torch._int_mm(codes, self.codes[some].T))
            block.mul_(steps[:, None]).mul_(self.steps[some])
            # <q, x> = <q', x'> + <q', x - x'> + <q - q', x>, where q' is no longer than q and what is cut off of it.
            block.addcmul_(lengths + cut_off[:, None], self.cut_off[some])
            block.addcmul_(cut_off[:, None] + SLACK * lengths, self.lengths[some])
        return bounds if forbidden is None else bounds.masked_fill_(forbidden, -torch.inf)


def _rounded(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers of vectors in steps, (n, width), the step of each, and the length of what is cut off, (n,)."""
    steps = (vectors.abs().amax(dim=1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (vectors / steps[:, None]).round_()
    return codes.to(torch.int8), steps, torch.addcmul(vectors, codes, steps[:, None], value=-1).norm(dim=1)
