"""The parts that an index is built from: trained once, filled part by part, merged; a crash loses one part at most."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgda_core.search.build import (
    add,
    can_merge,
    is_row_of_codes,
    join,
    merge,
    new_index,
    read_index,
    reserve,
    train,
    training_rows,
    write_index,
)
from fastgda_core.search.on_disk import map_index, with_lists, write_lists
from storage_schemas.commit import commit, committed, manifest_path, read_manifest
from storage_schemas.files import AnyPath, local_copy, matching, remove, remove_folder
from storage_schemas.workspace import part
from tasks.distilling.vectors import Block, blocks_of

GROUP_PARTS = 32  # parts of vectors that make one part of an index: half a million vectors
TRAINING_PARTS = 256  # of which vectors for training are drawn, at most
SAVED_AFTER = 600.0  # seconds of work on a graph, which has no parts, after which it is saved


@dataclass(frozen=True, eq=False)
class IndexParts:
    """An index in the making.

    folder: of what goes when the index is there.
    paths: the parts of its vectors.
    removed: train_ids that it leaves out.
    lists: where its inverted lists are to be a file of their own; None: they are in memory, and then in the index.
    """

    folder: AnyPath
    key: str
    kind: str
    width: int
    paths: Sequence[AnyPath]
    removed: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    lists: AnyPath | None = None

    @property
    def count(self) -> int:
        return -(-len(self.paths) // GROUP_PARTS)

    def vectors_of(self, number: int) -> range:
        """Return which parts of the vectors make a part of the index."""
        return range(number * GROUP_PARTS, min((number + 1) * GROUP_PARTS, len(self.paths)))

    @property
    def learns_from(self) -> list[int]:
        """The parts of the vectors that training needs, evenly spread; none where the kind needs no training."""
        if not training_rows(self.kind):
            return []
        return np.unique(np.linspace(0, len(self.paths) - 1, TRAINING_PARTS).round().astype(int)).tolist()

    def empty(self) -> Any:
        """Return an index without vectors, trained; the training is done once and kept."""
        index = new_index(self.kind, self.width)
        if index.is_trained:
            return index
        path = self.folder / "trained.faiss"
        if committed(path, self.key) is None:
            started, vectors = time.monotonic(), self._for_training()
            train(index, vectors, kind=self.kind)
            self._keep(path, index, started, rows=len(vectors))
        return read_index(local_copy(path))

    def make(self, number: int, advance: Callable[[int], None]) -> None:
        """Make one part of an index whose kind can be merged, unless it is there."""
        path = part(self.folder, number, "faiss")
        if committed(path, self.key) is None:
            started = time.monotonic()
            self._keep(path, self._filled(number, self.empty(), advance), started)

    @property
    def mergeable(self) -> bool:
        return can_merge(new_index(self.kind, self.width))

    def whole(self, advance: Callable[[int], None]) -> Any:
        """Make what is missing and return the index.

        In memory are at most the index and one part; one part alone where its lists are a file of their own, and the
        index alone where it is a row of codes.
        """
        if self.lists is not None:
            return self._on_disk(self.lists, advance)
        if not self.mergeable:
            return self._grown(advance)
        if self.count == 1 and committed(part(self.folder, 0, "faiss"), self.key) is None:
            return self._filled(0, self.empty(), advance)
        for number in range(self.count):
            self.make(number, advance)
        index = self.empty()
        if is_row_of_codes(index):
            join(index, [map_index(path) for path in self._local()])
            return index
        index = None
        for number in range(self.count):
            later = read_index(local_copy(part(self.folder, number, "faiss")))
            if index is None:
                index = later
            else:
                merge(index, later)
        assert index is not None
        return index

    def _on_disk(self, lists: AnyPath, advance: Callable[[int], None]) -> Any:
        """Make what is missing and commit the lists of all parts as one file; return the index over it."""
        if committed(lists, self.key) is None:
            started = time.monotonic()
            for number in range(self.count):
                self.make(number, advance)
            parts = [map_index(path) for path in self._local()]
            rows = sum(each.ntotal for each in parts)
            commit(lists, functools.partial(write_lists, parts), key=self.key, rows=rows, started=started)
        return with_lists(self.empty(), local_copy(lists))

    def _local(self) -> list[Path]:
        return [local_copy(part(self.folder, number, "faiss")) for number in range(self.count)]

    def clear(self) -> None:
        """Delete what is not needed once the index is there."""
        remove_folder(self.folder)

    def _grown(self, advance: Callable[[int], None]) -> Any:
        """Fill an index that cannot be merged, in order; every ten minutes it is saved as far as it came."""
        done, index, since = 0, None, time.monotonic()
        for path in matching(self.folder, "grown-*.faiss"):
            if committed(path, self.key) is not None:
                done, index = int(path.stem.rpartition("-")[2]), read_index(local_copy(path))
        index = self.empty() if index is None else index
        for number in range(done, self.count):
            index = self._filled(number, index, advance)
            if time.monotonic() - since > SAVED_AFTER and number + 1 < self.count:
                earlier = matching(self.folder, "grown-*.faiss")
                self._keep(self.folder / f"grown-{number + 1:05d}.faiss", index, since)
                for path in earlier:
                    remove(path)
                    remove(manifest_path(path))
                since = time.monotonic()
        return index

    def _filled(self, number: int, index: Any, advance: Callable[[int], None]) -> Any:
        manifests = [read_manifest(self.paths[each]) for each in self.vectors_of(number)]
        reserve(index, sum(each.rows for each in manifests if each is not None))
        for block in self._blocks(self.vectors_of(number)):
            add(index, block.vectors, block.train_ids)
            advance(len(block.train_ids))
        return index

    def _blocks(self, numbers: Sequence[int]) -> Iterator[Block]:
        return blocks_of([self.paths[number] for number in numbers], self.removed)

    def _for_training(self) -> NDArray[np.float32]:
        rng, numbers, chosen = np.random.default_rng(0), self.learns_from, []
        each = -(-training_rows(self.kind) // len(numbers))
        for block in self._blocks(numbers):
            rows = np.sort(rng.permutation(len(block.train_ids))[:each])
            chosen.append(block.vectors[rows])
        return np.concatenate(chosen)

    def _keep(self, path: AnyPath, index: Any, started: float, *, rows: int | None = None) -> None:
        count = index.ntotal if rows is None else rows
        commit(path, functools.partial(write_index, index), key=self.key, rows=count, started=started)
