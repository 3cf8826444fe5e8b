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


def search(index: faiss.Index, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return inner products and train_ids of the k best, (queries, k) each, in order; k is cut to the index's size."""
    similarity, train_ids = index.search(np.ascontiguousarray(queries), min(k, index.ntotal))
    return similarity, train_ids
