"""Exact cosine search over the head's embeddings with FAISS."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray


def build_index(embeddings: NDArray[np.float32]) -> faiss.Index:
    """Build an inner-product index of unit vectors, (n, d), one for each train_id in order."""
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(np.ascontiguousarray(embeddings))
    return index


def write_index(index: faiss.Index, path: Path) -> None:
    faiss.write_index(index, str(path))


def read_index(path: Path) -> faiss.Index:
    return faiss.read_index(str(path))


def search(index: faiss.Index, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return cosines and train_ids of the k nearest, (queries, k) each, best first; k is cut to the index's size."""
    similarity, train_ids = index.search(np.ascontiguousarray(queries), min(k, index.ntotal))
    return similarity, train_ids
