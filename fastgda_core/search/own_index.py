"""Neighbours by a similarity index that others built, of as many rows as they like; nothing of it is copied.

A number inside such an index is the row of its metadata: indexes by autofaiss, and so by clip-retrieval, are filled in
the order of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from fastgda_core.search.build import Vectors, faiss, read_index
from fastgda_core.search.on_disk import map_index

READ_EACH = 16  # times the rows asked for that lists which are looked at hold, unless told otherwise
LEAST_LISTS = 64  # that are looked at, unless told otherwise
_AT_ONCE = 16  # queries: numbers and similarities of 100,000 rows each are 19 MB


@dataclass(frozen=True, eq=False)
class OwnIndex:
    """An index that is mapped from its file, and how much of it a query looks at.

    nprobe: inverted lists; nodes of a graph are as many as are asked for, times two.
    """

    index: Any
    nprobe: int | None

    @property
    def rows(self) -> int:
        return int(self.index.ntotal)

    @property
    def width(self) -> int:
        return int(self.index.d)

    @property
    def is_cosine(self) -> bool:
        """Whether a similarity is the inner product with a query of length one; else minus a squared distance."""
        return bool(self.index.metric_type == faiss.METRIC_INNER_PRODUCT)

    def lists(self, k: int) -> tuple[int, int]:
        """Return how many inverted lists a query for k rows looks at, and how many there are; (0, 0) without lists."""
        found = faiss.try_extract_index_ivf(self.index)
        if found is None:
            return 0, 0
        wanted = self.nprobe or max(LEAST_LISTS, math.ceil(READ_EACH * k * found.nlist / max(1, self.rows)))
        return min(wanted, int(found.nlist)), int(found.nlist)

    def nearest(self, queries: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """Return similarities and rows of the k nearest, (queries, k) each, nearest first.

        Where lists that are looked at hold fewer than k rows, -1 stands at the end. k is cut to the rows there are.

        Args:
            queries: (queries, width), as the encoder gives them: their length matters to squared distances alone.

        Raises:
            UsageError: they have another width.
        """
        if queries.shape[1] != self.width:
            raise UsageError(f"queries of {queries.shape[1]} numbers were asked of an index of {self.width}")
        block = np.ascontiguousarray(_unit(queries) if self.is_cosine else queries, dtype=np.float32)
        k = min(k, self.rows)
        params = _parameters(self.index, self.lists(k)[0], 2 * k)
        found = [self.index.search(block[i : i + _AT_ONCE], k, params=params) for i in range(0, len(block), _AT_ONCE)]
        similarity, rows = (np.concatenate(each) for each in zip(*found, strict=True))
        return (similarity if self.is_cosine else -similarity), rows


def open_own_index(path: Path, nprobe: int | None) -> OwnIndex:
    """Map an index: a file, or a folder that has `populated.index` and the file of its lists beside it.

    Raises:
        UsageError: it is no whole index, is empty, or is of another similarity than inner products and distances.
    """
    beside = path / "populated.index"
    index = read_index(beside, faiss.IO_FLAG_ONDISK_SAME_DIR) if path.is_dir() else map_index(path)
    if index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise UsageError(f"{path} is an index of another similarity than inner products and squared distances")
    if not index.ntotal:
        raise UsageError(f"{path} is an empty index")
    return OwnIndex(index, nprobe)


def _parameters(index: Any, nprobe: int, ef_search: int) -> Any:
    """Return FAISS's parameters of one call, from the outside in; None where the kind has none."""
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(faiss.downcast_index(index.index), nprobe, ef_search)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        graph = isinstance(faiss.downcast_index(index.quantizer), faiss.IndexHNSW)
        # A graph of the lists' centres that looks at fewer nodes than lists are wanted names wrong ones.
        of_lists = {"quantizer_params": faiss.SearchParametersHNSW(efSearch=2 * nprobe)} if graph else {}
        return faiss.SearchParametersIVF(nprobe=nprobe, **of_lists)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=ef_search)
    return None


def exact_rows(blocks: Iterable[Vectors], queries: Vectors, k: int, *, cosine: bool) -> NDArray[np.int64]:
    """Return the rows of the k nearest by looking at every vector once, (queries, k), in no order.

    Args:
        blocks: all vectors, (n_i, width) each, in the order of their rows; no two blocks are held at once.
        queries: (queries, width).
        cosine: by the inner product with queries of length one; else by the squared distance.
    """
    wanted = (_unit(queries) if cosine else queries).astype(np.float32)
    best = np.empty((len(wanted), 0), np.float32)
    rows, first = np.empty((len(wanted), 0), np.int64), 0
    for block in blocks:
        vectors = block.astype(np.float32)
        near = wanted @ vectors.T
        if not cosine:  # but for the query's own square, which orders nothing
            near = 2 * near - np.square(vectors).sum(1)
        numbers = np.broadcast_to(np.arange(first, first + len(vectors)), near.shape)
        best, rows = np.concatenate([best, near], axis=1), np.concatenate([rows, numbers], axis=1)
        if best.shape[1] > k:
            kept = np.argpartition(-best, k - 1, axis=1)[:, :k]
            best, rows = np.take_along_axis(best, kept, 1), np.take_along_axis(rows, kept, 1)
        first += len(vectors)
    return rows


def _unit(vectors: Vectors) -> Vectors:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Vectors = (vectors / np.where(length > 0, length, 1)).astype(np.float32)
    return found
