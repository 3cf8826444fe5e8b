"""Exact search over the head's vectors with FAISS."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray


def build_index(embeddings: NDArray[np.float32], *, half: bool = False) -> faiss.Index:
    """Build an inner-product index of vectors, (n, d), one for each train_id in order; `half`: in half precision."""
    width = embeddings.shape[1]
    index: faiss.Index = faiss.IndexFlatIP(width)
    if half:
        index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.add(np.ascontiguousarray(embeddings))
    return index


def write_index(index: faiss.Index, path: Path) -> None:
    faiss.write_index(index, str(path))


def read_index(path: Path) -> faiss.Index:
    return faiss.read_index(str(path))


def search(
    index: faiss.Index, queries: NDArray[np.float32], k: int, *, allowed: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return inner products and train_ids of the k best, (queries, k) each, in order.

    Args:
        index: of one vector for each train_id.
        queries: (queries, width).
        k: how many; cut to as many as there are.
        allowed: whether each train_id may be found, (n,); None: all may. It is a parameter of this one search, so that
            other threads search the same index by others.
    """
    params, count = None, index.ntotal
    if allowed is not None:
        bitmap = np.packbits(allowed, bitorder="little")  # has to outlive the search, which reads it where it lies
        selector = faiss.IDSelectorBitmap(len(bitmap), faiss.swig_ptr(bitmap))
        params = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]  # FAISS adds it when it is loaded
        count = int(np.count_nonzero(allowed))
    if min(k, count) == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    similarity, train_ids = index.search(np.ascontiguousarray(queries), min(k, count), params=params)
    return similarity, train_ids
