"""Products with every vector of an exact index, for many queries at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.search.build import faiss

ROWS = 2**15  # compared at a time
GROUP = 64  # products of which the largest speaks for the others


def is_exact(index: Any) -> bool:
    """Return whether an index looks at every vector, whole or in half precision, by inner products."""
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or not index.ntotal:
        return False
    half = isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    return half or isinstance(index, faiss.IndexFlat)


def vectors_of(index: Any) -> Tensor:
    """Return the vectors of an exact index where FAISS has them, in memory or mapped, (n, width).

    Nobody may write to them, and the index has to outlive them.
    """
    codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    kind = np.float32 if isinstance(index, faiss.IndexFlat) else np.float16
    return torch.from_numpy(codes.view(kind).reshape(index.ntotal, index.d))


def largest_products(
    vectors: Tensor, queries: Tensor, k: int, allowed: NDArray[np.bool_] | None
) -> tuple[Tensor, Tensor]:
    """Return the k largest inner products, computed in single precision, and the places of their vectors, in order.

    FAISS compares queries one by one in half precision, and by a slow product in single precision.

    Args:
        vectors: (n, width), whole or in half precision.
        queries: (queries, width).
        k: at most as many as are allowed.
        allowed: by place; None: every vector.
    """
    similarity, places = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(vectors), ROWS):
        products = queries @ vectors[start : start + ROWS].float().T
        if allowed is not None:
            products.masked_fill_(torch.from_numpy(~allowed[start : start + ROWS]), -torch.inf)
        found, rows = largest(products, min(k, products.shape[1]))
        similarity, places = torch.cat([similarity, found], 1), torch.cat([places, rows + start], 1)
    similarity, order = similarity.topk(k, dim=1)
    return similarity, places.gather(1, order)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest numbers of each row and their columns, in order: the k groups with the largest hold them."""
    rows, columns = values.shape
    whole = columns // GROUP
    if whole < 2 * k:
        found = values.topk(k, dim=1)
        return found.values, found.indices
    groups = values[:, : whole * GROUP].view(rows, whole, GROUP)
    best = groups.amax(dim=2).topk(k, dim=1).indices
    inside = best[:, :, None] * GROUP + torch.arange(GROUP)
    rest = torch.arange(whole * GROUP, columns).expand(rows, -1)
    candidates = torch.cat([inside.view(rows, -1), rest], dim=1)
    found = values.gather(1, candidates).topk(k, dim=1)
    return found.values, candidates.gather(1, found.indices)
