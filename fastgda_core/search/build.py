"""Build a FAISS index: trained once, filled in blocks, in parts that are merged.

Numbers of vectors inside an index are train_ids where it is made of inverted lists alone, which keep ids of their own,
and places in it from 0 for every other kind. Nothing is wrapped in an `IndexIDMap`: its removals shift ids
(faiss #4656), and it hides what search parameters need to reach.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss as typed_faiss
import numpy as np
from numpy.typing import NDArray

from fastgda_core.errors import UsageError

# The package's stubs know few of its classes and arguments. Indexes come from it in their own class; members of one, as
# `base_index`, have to be cast by `downcast_index`, which must not be done to the whole: it would be freed under us.
faiss: Any = typed_faiss

TRAINING_EACH = 40  # vectors that a list is trained on; FAISS asks for 39
TRAINING_LEAST = 10_000  # of codes that learn, and of 256 centroids a piece
Vectors = NDArray[np.float32]


def new_index(kind: str, width: int) -> Any:
    """Return an empty, untrained index of inner products.

    Raises:
        UsageError: FAISS knows no such kind, or not for this width.
    """
    try:
        index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(f"index.kind {kind} of vectors of {width}: {first_line(error)}") from None
    return index


def training_rows(kind: str) -> int:
    """Return how many vectors a kind is trained on at most; 0 where it needs no training."""
    lists = re.search(r"IVF(\d+)", kind)
    if lists is not None:
        return max(TRAINING_LEAST, TRAINING_EACH * int(lists[1]))
    learned = any(code in kind for code in ("SQ4", "SQ6", "SQ8"))
    return TRAINING_LEAST if learned else 0


def train(index: Any, vectors: Vectors, *, kind: str) -> None:
    """Train an index on some of its vectors, (n, width); lists are clustered on GPUs where `faiss-gpu` has some.

    Raises:
        UsageError: there are fewer vectors than lists or centroids.
    """
    if index.is_trained:
        return
    lists = _lists(index)
    if lists is not None and len(vectors) < lists.nlist:
        raise UsageError(
            f"index.kind {kind} has {lists.nlist:,} lists and there are {len(vectors):,} vectors: lower it"
        )
    if lists is not None and getattr(faiss, "get_num_gpus", lambda: 0)():
        lists.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(lists.quantizer.d))
    try:
        index.train(np.ascontiguousarray(vectors))
    except RuntimeError as error:
        raise UsageError(
            f"index.kind {kind} does not learn from {len(vectors):,} vectors: {first_line(error)}"
        ) from None
    if lists is not None:
        lists.clustering_index = None


def add(index: Any, vectors: Vectors, train_ids: NDArray[np.int64]) -> None:
    """Add a block of vectors, (n, width), of these training samples, (n,), ascending."""
    block = np.ascontiguousarray(vectors, dtype=np.float32)
    if has_own_ids(index):
        index.add_with_ids(block, np.ascontiguousarray(train_ids, dtype=np.int64))
    else:
        index.add(block)


def has_own_ids(index: Any) -> bool:
    """Return whether numbers inside are train_ids; else they are places in the order of addition."""
    return not isinstance(index, faiss.IndexRefine) and _lists(index) is not None


def can_merge(index: Any) -> bool:
    """Return whether indexes that were trained together can become one; graphs cannot."""
    base = faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index
    return not isinstance(base, faiss.IndexHNSW)


def merge(index: Any, later: Any) -> None:
    """Move the vectors of another index behind those of this one; both have been trained together.

    Raises:
        RuntimeError: the totals do not add up, which no file may be written of.
    """
    first, second = index.ntotal, later.ntotal
    if isinstance(index, faiss.IndexRefine):  # FAISS merges none, but both halves of it
        base, refined = faiss.downcast_index(later.base_index), faiss.downcast_index(later.refine_index)
        faiss.downcast_index(index.base_index).merge_from(base, first if _lists(index) is not None else 0)
        faiss.downcast_index(index.refine_index).merge_from(refined, 0)
        index.ntotal = index.base_index.ntotal
        totals = {index.base_index.ntotal, index.refine_index.ntotal}
    else:
        index.merge_from(later, 0)
        totals = {index.ntotal}
    # Totals that lag behind their lists are written, and read, as a smaller index (faiss #3651).
    lists = _lists(index)
    if lists is not None:
        totals.add(lists.invlists.compute_ntotal())
    if totals != {first + second}:
        raise RuntimeError(f"merged {first} and {second} vectors into {sorted(totals)}")


def is_row_of_codes(index: Any) -> bool:
    """Return whether an index is nothing but the codes of its vectors, one behind the other."""
    return isinstance(index, faiss.IndexFlatCodes)


def reserve(index: Any, rows: int) -> None:
    """Take the memory of so many vectors at once, where an empty index is a row of codes: growing, it takes twice."""
    if is_row_of_codes(index) and not index.ntotal:
        index.codes.resize(int(index.code_size) * rows)
        index.codes.resize(0)


def join(index: Any, parts: Sequence[Any]) -> None:
    """Copy the vectors of others into an empty index that is but a row of codes.

    The whole is as large as it will be from the beginning, where merging one by one moves it each time.
    """
    each = int(index.code_size)
    index.codes.resize(each * sum(part.ntotal for part in parts))
    whole = faiss.rev_swig_ptr(index.codes.data(), index.codes.size())
    for part in parts:
        size = each * part.ntotal
        whole[each * index.ntotal :][:size] = faiss.rev_swig_ptr(part.codes.data(), size)
        index.ntotal += part.ntotal


def write_index(index: Any, path: Path) -> None:
    faiss.write_index(index, str(path))


def read_index(path: Path, flags: int = 0) -> Any:
    """Read an index into memory, to be added to or merged; `flags` are FAISS's.

    Raises:
        UsageError: it is cut short, or is none.
    """
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise UsageError(f"{path} is no whole index: {first_line(error)}") from None


def faiss_version() -> str:
    return str(faiss.__version__)


def _lists(index: Any) -> Any:
    """Return the inverted lists of an index, through whatever lies over them; None where it has none."""
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.base_index)
    return faiss.try_extract_index_ivf(index)


def first_line(error: Exception) -> str:
    """Return what FAISS says without its place in its source."""
    return str(error).rpartition("Error: ")[2].split("\n")[0].strip() or str(error).split("\n")[0]
