"""Many queries at once against every vector of an exact index.

FAISS compares them one by one in half precision, and by a slow product in single precision. Here a product in bfloat16,
which processors have units for, names some more than k vectors of each query, and exact products of these decide. A
bound on the rounding says whether any other vector could have been among the k; where one could, the query is compared
with all vectors in single precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.search.build import Vectors, faiss

MANY = 16  # queries from which this is faster
MORE = 2  # times k vectors are named
ROWS = 2**15  # compared at a time
# Of the lengths' product: two factors are rounded by 2^-9 each, and so is the result.
ROUNDED = 3 * 2.0**-9


class Together:
    """The vectors of an exact index, once more in bfloat16 where that is fast.

    index: a flat one, or one in half precision, of inner products; its vectors are not copied.
    """

    def __init__(self, index: Any) -> None:
        self.index = index  # whose memory the vectors lie in
        self.vectors = torch.from_numpy(_codes(index))
        self.rough: Tensor | None = None
        if _fast_bfloat16():
            self.rough = torch.empty(self.vectors.shape, dtype=torch.bfloat16)
            longest = 0.0
            for start in range(0, len(self.vectors), ROWS):
                block = self.vectors[start : start + ROWS]
                self.rough[start : start + ROWS] = block
                longest = max(longest, block.float().norm(dim=1).max().item())
            self.longest = longest

    @staticmethod
    def suits(index: Any) -> bool:
        """Return whether an index looks at every vector, in a precision that is exact enough."""
        if index.metric_type != faiss.METRIC_INNER_PRODUCT or not index.ntotal:
            return False
        half = isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        return half or isinstance(index, faiss.IndexFlat)

    def search(self, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None) -> tuple[Vectors, NDArray[np.int64]]:
        """Return the k largest inner products and the places of these vectors, (queries, k) each, in order.

        Args:
            queries: (queries, width).
            k: at most as many as are allowed.
            allowed: by place; None: every vector.
        """
        asked = torch.from_numpy(np.ascontiguousarray(queries))
        forbidden = None if allowed is None else torch.from_numpy(~allowed)
        if self.rough is None or (1 + MORE) * k >= len(self.vectors):
            return _as_numpy(self._largest(asked, self.vectors, k, forbidden))
        rough, named = self._largest(asked.bfloat16(), self.rough, (1 + MORE) * k, forbidden)
        exact = torch.stack(
            [self.vectors[places].float() @ query for places, query in zip(named, asked, strict=True)]
        ).masked_fill(rough == -torch.inf, -torch.inf)
        similarity, order = exact.topk(k, dim=1)
        places = named.gather(1, order)
        beyond = rough[:, -1] + ROUNDED * self.longest * asked.norm(dim=1)
        unsure = (similarity[:, -1] < beyond).nonzero().flatten()
        if len(unsure):
            similarity[unsure], places[unsure] = self._largest(asked[unsure], self.vectors, k, forbidden)
        return _as_numpy((similarity, places))

    @staticmethod
    def _largest(asked: Tensor, vectors: Tensor, k: int, forbidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the k largest products and their places, block by block, computed in the precision of the queries."""
        similarity, places = torch.empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64)
        for start in range(0, len(vectors), ROWS):
            products = (asked @ vectors[start : start + ROWS].to(asked.dtype).T).float()
            if forbidden is not None:
                products.masked_fill_(forbidden[start : start + ROWS], -torch.inf)
            found, rows = products.topk(min(k, products.shape[1]), dim=1)
            similarity, places = torch.cat([similarity, found], 1), torch.cat([places, rows + start], 1)
        similarity, order = similarity.topk(k, dim=1)
        return similarity, places.gather(1, order)


def _codes(index: Any) -> NDArray[Any]:
    """Return the vectors where FAISS has them, in memory or mapped, (n, width); nobody may write to them."""
    shape = (index.ntotal, index.d)
    codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    kind = np.float32 if isinstance(index, faiss.IndexFlat) else np.float16
    return codes.view(kind).reshape(shape)


def _fast_bfloat16() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())


def _as_numpy(found: tuple[Tensor, Tensor]) -> tuple[Vectors, NDArray[np.int64]]:
    return found[0].numpy(), found[1].numpy()
