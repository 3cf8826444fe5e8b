"""Search an index: memory-mapped, filtered, with parameters of each call alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from fastgda_core.search.build import Vectors, faiss, first_line, has_own_ids
from fastgda_core.search.on_disk import with_lists
from fastgda_core.search.products import is_exact, largest_products, vectors_of
from fastgda_core.search.rounded import Rounded

MANY = 16  # queries at once for which one product is faster, or after which an exact index is worth rounding
TRIED = 64  # queries after which it is known whether rounding helps
FEW = 0.05  # share of vectors that are allowed, below which these are looked at one by one


@dataclass(frozen=True)
class SearchSettings:
    """How much of an index a query looks at; None where its kind has no such setting.

    nprobe: inverted lists. ef_search: nodes of a graph. k_factor: times k that are looked at again.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    k_factor: float | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """The vectors of one index that may be found, as a bitmap that any number of searches may use at once."""

    bits: NDArray[np.uint8]
    count: int
    total: int

    def as_mask(self) -> NDArray[np.bool_]:
        """Return whether each vector may be found, (total,), of an index that holds places."""
        return np.unpackbits(self.bits, count=self.total, bitorder="little").view(np.bool_)

    @property
    def selector(self) -> Any:
        """A selector over the bits, which have to outlive it."""
        return faiss.IDSelectorBitmap(len(self.bits), faiss.swig_ptr(self.bits))


class Searcher:
    """An index that answers.

    Nothing that is found depends on calls before, so that threads may share it: settings and filters go with each call.
    A large exact index keeps its vectors in 8 bits, too, after some queries, or `prepare`, as long as that helps.
    A server calls `faiss.omp_set_num_threads(1)` in each thread that searches: OpenMP keeps a pool of threads for
    every thread that calls it. It opens indexes after it forked: FAISS hangs in a child of a process whose OpenMP ran.

    Args:
        train_ids: training sample of each place in the index, (n,), where it holds places; None: the place is the id.
        settings: of calls that name none.
    """

    def __init__(
        self,
        index: Any,
        train_ids: NDArray[np.int64] | None = None,
        settings: SearchSettings | None = None,
    ) -> None:
        self.index = index
        self.settings = settings or SearchSettings()
        self.vectors, self.width = int(self.index.ntotal), int(self.index.d)
        places = train_ids is not None and not has_own_ids(self.index)
        if places and len(train_ids) != self.vectors:  # type: ignore[arg-type]
            raise UsageError(f"an index of {self.vectors:,} vectors has ids of {len(train_ids):,}")  # type: ignore[arg-type]
        dense = places and np.array_equal(train_ids, np.arange(self.vectors))  # type: ignore[arg-type]
        self._train_ids = train_ids if places and not dense else None
        self._asked = self._vain = 0
        self._rounding = threading.Lock()
        self._rounded: Rounded | None = None
        self._rounds = Rounded.suits(self.index)
        self._last = int(train_ids[-1]) if train_ids is not None and len(train_ids) else self.vectors - 1

    def selection(self, allowed: NDArray[np.bool_]) -> Selection:
        """Prepare a filter for this index; searches that use it again need not pack it again.

        Args:
            allowed: whether each training sample may be found, by train_id.

        Raises:
            UsageError: it ends before the last sample of the index.
        """
        if len(allowed) <= self._last:
            raise UsageError(
                f"a filter of {len(allowed):,} samples does not reach train_id {self._last:,} of the index"
            )
        by_number = allowed if self._train_ids is None else allowed[self._train_ids]
        if self._train_ids is None and not has_own_ids(self.index):
            by_number = by_number[: self.vectors]
        return Selection(np.packbits(by_number, bitorder="little"), int(np.count_nonzero(by_number)), self.vectors)

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        allowed: NDArray[np.bool_] | Selection | None = None,
        settings: SearchSettings | None = None,
    ) -> tuple[Vectors, NDArray[np.int64]]:
        """Return inner products and train_ids of the k best, (queries, k) each, in order.

        Where few vectors are allowed each of these is looked at, so that k of them are found if there are k; else an
        approximate index may find fewer, whose places at the end hold -inf and -1. k is cut to what is allowed.

        Args:
            queries: (queries, width).
            allowed: by train_id, or prepared by `selection`; None: every sample.
            settings: None: those of the index.
        """
        if isinstance(allowed, np.ndarray):
            allowed = self.selection(allowed)
        k = min(k, self.vectors if allowed is None else min(allowed.count, allowed.total))
        block = np.ascontiguousarray(queries, dtype=np.float32)
        if k <= 0:
            return np.empty((len(block), 0), np.float32), np.empty((len(block), 0), np.int64)
        if self._rounds and self._rounded is None and self._asked + len(block) >= MANY:
            self.prepare()
        rounded = self._rounded if self._rounds else None
        if allowed is not None and allowed.count < FEW * allowed.total:
            similarity, numbers = self._scan(block, k, allowed)
        elif rounded is not None:
            similarity, numbers, vain = rounded.search(block, k, None if allowed is None else allowed.as_mask())
            if vain.any():
                similarity[vain], numbers[vain] = self._whole(block[vain], k, allowed, settings)
            self._count(len(block), int(vain.sum()))
        else:
            similarity, numbers = self._whole(block, k, allowed, settings)
            self._asked += len(block)
        found = numbers >= 0
        similarity[~found] = -np.inf
        if self._train_ids is not None:
            numbers = np.where(found, self._train_ids[np.maximum(numbers, 0)], -1)
        return similarity, numbers

    def prepare(self) -> None:
        """Make ready for many queries: round the vectors of an exact index. Who finds another thread at it goes on."""
        if self._rounds and self._rounded is None and self._rounding.acquire(blocking=False):
            try:
                self._rounded = self._rounded or Rounded(self.index)
            finally:
                self._rounding.release()

    def _count(self, asked: int, vain: int) -> None:
        """Keep count of queries that rounded vectors could not answer; where these are many, give the vectors up."""
        self._asked, self._vain = self._asked + asked, self._vain + vain
        if self._asked >= TRIED and 2 * self._vain > self._asked:
            self._rounds, self._rounded = False, None

    def _whole(
        self, queries: Vectors, k: int, allowed: Selection | None, settings: SearchSettings | None
    ) -> tuple[Vectors, NDArray[np.int64]]:
        """Ask FAISS, or, many queries of an exact index, multiply; -1 stands where an approximate one finds no more."""
        if len(queries) >= MANY and is_exact(self.index):
            mask = None if allowed is None else allowed.as_mask()
            found = largest_products(vectors_of(self.index), torch.from_numpy(queries), k, mask)
            return found[0].numpy(), found[1].numpy()
        params = search_parameters(self.index, settings or self.settings, allowed)
        similarity, numbers = self.index.search(queries, k, params=params)
        short = np.flatnonzero((numbers < 0).any(axis=1))
        if len(short) and allowed is not None:
            similarity[short], numbers[short] = self._scan(queries[short], k, allowed)
        return similarity, numbers

    def _scan(self, queries: Vectors, k: int, allowed: Selection) -> tuple[Vectors, NDArray[np.int64]]:
        """Look at every allowed vector: a graph may lead to none of them, and lists that are near may hold none."""
        flat, settings = self.index, self.settings
        if isinstance(flat, faiss.IndexRefine):
            flat = faiss.downcast_index(flat.refine_index)
        elif isinstance(flat, faiss.IndexHNSW):
            flat = faiss.downcast_index(flat.storage)
        elif (lists := faiss.try_extract_index_ivf(flat)) is not None:
            settings = replace(settings, nprobe=lists.nlist)
        found: tuple[Vectors, NDArray[np.int64]]
        found = flat.search(queries, k, params=search_parameters(flat, settings, allowed))
        return found


def search_parameters(index: Any, settings: SearchSettings, allowed: Selection | None) -> Any:
    """Return FAISS's parameters of one call, of the classes that the kind of index needs, from the outside in."""
    given = {} if allowed is None else {"sel": allowed.selector}
    if isinstance(index, faiss.IndexRefine):
        base = search_parameters(faiss.downcast_index(index.base_index), settings, allowed)
        k_factor = settings.k_factor or 1.0
        return faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=base, **given)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(faiss.downcast_index(index.index), settings, allowed)
        return faiss.SearchParametersPreTransform(index_params=inner, **given)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(settings.nprobe or 1, index.nlist), **given)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=settings.ef_search or 16, **given)
    return faiss.SearchParameters(**given) if given else None


def open_index(
    path: Path,
    train_ids: NDArray[np.int64] | None = None,
    settings: SearchSettings | None = None,
    lists: Path | None = None,
) -> Searcher:
    """Open an index where it lies on this machine's disk: what a query does not look at is never read.

    The file must be whole and one's own: see `tasks.distilling.opened_index.open_search_index`, which compares it with
    what was committed. FAISS reads headers of hostile files without much care. `lists` is the file of its inverted
    lists, where they lie beside it.

    Raises:
        UsageError: it is cut short, or is no index.
    """
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise UsageError(
            f"{path} is no whole index ({first_line(error)}): `fastgda index build CONFIG` builds it again"
        ) from None
    return Searcher(index if lists is None else with_lists(index, lists), train_ids, settings)
