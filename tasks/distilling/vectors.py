"""A head's vectors of training samples, committed in parts of 16,384: what any index is built from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from storage_schemas.files import AnyPath
from storage_schemas.listings import committed_parts
from storage_schemas.workspace import Workspace, part
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.answering import Answering, answering_head
from tasks.inputs.features import PART_ITEMS, as_lists, feature_blocks
from tasks.progress import stage

FEATURE_PARTS = 16  # that make one part of vectors
VECTOR_PART_SAMPLES = FEATURE_PARTS * PART_ITEMS


class Block(NamedTuple):
    """Some training samples, (n,) ascending, and their vectors, (n, width) float32."""

    train_ids: NDArray[np.int64]
    vectors: NDArray[np.float32]


def read_vectors(path: AnyPath) -> Block:
    """Read one part.

    Raises:
        DamagedTable: the file is damaged.
    """
    table = tables.read(path, tables.VECTORS)
    column = table["vector"].combine_chunks()
    # Copies: torch takes no memory that it may not write to.
    return Block(table["train_id"].to_numpy().copy(), column.flatten().to_numpy().reshape(len(column), -1).copy())


def write_vectors(path: AnyPath, block: Block, *, key: str, started: float) -> Manifest:
    """Commit one part."""
    vector = as_lists(torch.from_numpy(block.vectors))
    rows = tables.VECTORS.rows(train_id=block.train_ids, vector=vector)
    return commit_table(path, rows, tables.VECTORS, key=key, started=started)


@dataclass(frozen=True, eq=False)
class VectorParts:
    """Vectors of training samples by one head, each part of which is made once, by whichever process comes first.

    first: train_id of the first sample.
    pieces: returns the vectors of the samples of one part, (n,) ascending train_ids, in order and in pieces.
    """

    workspace: Workspace
    artifact: Artifact
    head: Artifact
    first: int
    pieces: Callable[[Answering, Tensor], Iterator[Tensor]]

    @cached_property
    def paths(self) -> list[AnyPath]:
        """The path of every part."""
        count = -(-self.artifact.rows // VECTOR_PART_SAMPLES)
        return [part(self.artifact.path, number) for number in range(count)]

    def made(self, chosen: Sequence[int] | None = None) -> None:
        """Make what is missing of some parts, or of all."""
        there = committed_parts(self.artifact.path, self.artifact.key)
        wanted = range(len(self.paths)) if chosen is None else chosen
        missing = [number for number in wanted if self.paths[number].name not in there]
        if not missing:
            return
        head = answering_head(self.workspace, self.head.path, by_part=True)
        with stage("vectors", sum(len(self._samples(number)) for number in missing)) as advance:
            for number in missing:
                started, samples = time.monotonic(), self._samples(number)
                train_ids = torch.arange(samples.start, samples.stop)
                vectors = torch.cat([piece.float() for piece in self.pieces(head, train_ids)])
                block = Block(train_ids.numpy(), vectors.numpy())
                write_vectors(self.paths[number], block, key=self.artifact.key, started=started)
                advance(len(train_ids))

    def _samples(self, number: int) -> range:
        start = number * VECTOR_PART_SAMPLES
        return range(self.first + start, self.first + min(start + VECTOR_PART_SAMPLES, self.artifact.rows))


def head_vectors(
    context: Context, samples: Artifact, features: Artifact, head: Artifact, mean: Tensor | None
) -> VectorParts:
    """Return the vectors of all samples by a head; `mean` is subtracted from their features, (d,)."""

    def pieces(answering: Answering, train_ids: Tensor) -> Iterator[Tensor]:
        first = int(train_ids[0]) // PART_ITEMS
        blocks = feature_blocks(context, samples, mean, first=first, last=first + FEATURE_PARTS)
        for some, phi in zip(train_ids.split(PART_ITEMS), blocks, strict=True):
            yield answering.samples(some, phi)

    key = input_key("vectors", head.key, features.key, table=tables.VECTORS)
    artifact = Artifact("vectors", key, context.workspace.vectors(key), samples.rows)
    return VectorParts(context.workspace, artifact, head, 0, pieces)


def blocks_of(paths: Sequence[AnyPath], removed: NDArray[np.int64] | None = None) -> Iterator[Block]:
    """Yield parts in order, without the vectors of removed samples."""
    for path in paths:
        block = read_vectors(path)
        if removed is not None and len(removed):
            kept = ~np.isin(block.train_ids, removed)
            block = Block(block.train_ids[kept], block.vectors[kept])
        if len(block.train_ids):
            yield block
