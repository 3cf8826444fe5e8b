"""Inverted lists in a file of their own, for an index that is larger than memory.

The file holds, list by list, the codes and the ids of its vectors, then the length of every list as int64. It is
written in order, from parts that are mapped, so that of these no more is in memory than the system likes. FAISS's own
file names its place in the index, where it is not found after a move, and has no sum to compare its length with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgda_core.errors import UsageError
from fastgda_core.search.build import faiss, has_own_ids, read_index

ID_BYTES = 8


def can_lie_on_disk(index: Any) -> bool:
    """Return whether an index is made of inverted lists alone, one code behind the other.

    Kinds with `fs` pack codes in blocks of 32, and a refined index keeps its second half outside the lists.
    """
    if not has_own_ids(index):
        return False
    return not isinstance(faiss.downcast_index(faiss.extract_index_ivf(index)), faiss.IndexIVFFastScan)


def map_index(path: Path) -> Any:
    """Read an index whose vectors stay in their file until they are looked at.

    Raises:
        UsageError: it is cut short, or is none.
    """
    return read_index(path, faiss.IO_FLAG_MMAP_IFC)


def write_lists(parts: Sequence[Any], path: Path) -> None:
    """Write the lists of indexes that were trained together, those of the first in front."""
    every = [faiss.extract_index_ivf(each).invlists for each in parts]
    lengths = np.zeros(every[0].nlist, np.int64)
    with path.open("wb") as file:
        for number in range(len(lengths)):
            pieces = [(lists, length) for lists in every if (length := lists.list_size(number))]
            for lists, length in pieces:
                file.write(faiss.rev_swig_ptr(lists.get_codes(number), length * lists.code_size))
            for lists, length in pieces:
                file.write(faiss.rev_swig_ptr(lists.get_ids(number), length))
                lengths[number] += length
        file.write(lengths.tobytes())


def with_lists(index: Any, path: Path) -> Any:
    """Give a trained index without vectors its lists, mapped from their file; return the index.

    Raises:
        UsageError: the file is not of this index, or not whole.
    """
    ivf = faiss.extract_index_ivf(index)
    code, tail, size = int(ivf.code_size), 8 * int(ivf.nlist), path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - tail))
        lengths = np.frombuffer(file.read(tail)[: tail // 8 * 8], np.int64) if size >= tail else np.empty(0, np.int64)
    if size < tail or (lengths < 0).any() or int(lengths.sum()) * (code + ID_BYTES) + tail != size:
        raise UsageError(f"{path} holds no whole inverted lists: `fastgda index build CONFIG` builds them again")
    lists, offset = faiss.OnDiskInvertedLists(ivf.nlist, code, str(path)), 0
    lists.lists.clear()
    for length in lengths.tolist():
        one = faiss.OnDiskOneList()
        one.size, one.capacity, one.offset = length, length, offset
        lists.lists.push_back(one)
        offset += length * (code + ID_BYTES)
    lists.totsize, lists.read_only = size, True
    lists.do_mmap()
    _give(index, ivf, lists, int(lengths.sum()))
    return index


def take_lists(index: Any) -> Any:
    """Leave an index without its lists, as it is written beside them; return it."""
    ivf = faiss.extract_index_ivf(index)
    _give(index, ivf, faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size), 0)
    return index


def _give(index: Any, ivf: Any, lists: Any, total: int) -> None:
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    ivf.ntotal = index.ntotal = total
