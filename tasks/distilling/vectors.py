"""A head's vectors of all training samples, committed in parts of 16,384: what any index is built from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from storage_schemas.files import AnyPath
from storage_schemas.listings import committed_parts
from storage_schemas.workspace import part
from tasks.artifact import Artifact, Made
from tasks.context import Context
from tasks.distilling.answering import Answering, answering_head
from tasks.inputs.features import PART_ITEMS, as_lists, feature_blocks, feature_mean
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
class HeadVectors:
    """The vectors of all samples by one head, each part of which is made once, by whichever process comes first."""

    context: Context
    samples: Artifact
    features: Artifact
    head: Artifact

    @property
    def artifact(self) -> Artifact:
        key = input_key("vectors", self.head.key, self.features.key, table=tables.VECTORS)
        return Artifact("vectors", key, self.context.workspace.vectors(key), self.samples.rows)

    @property
    def paths(self) -> list[AnyPath]:
        """The path of every part."""
        count = -(-self.samples.rows // VECTOR_PART_SAMPLES)
        return [part(self.artifact.path, number) for number in range(count)]

    def made(self, chosen: Sequence[int] | None = None) -> Made:
        """Make what is missing of some parts, or of all; the rows are those of all samples."""
        artifact, paths, started = self.artifact, self.paths, time.monotonic()
        there = committed_parts(artifact.path, artifact.key)
        wanted = range(len(paths)) if chosen is None else chosen
        missing = [number for number in wanted if paths[number].name not in there]
        if missing:
            head = answering_head(self.context.workspace, self.head.path, by_part=True)
            with stage("vectors", sum(self._rows(number) for number in missing)) as advance:
                for number in missing:
                    self._make(head, number)
                    advance(self._rows(number))
        return Made(artifact, time.monotonic() - started if missing else 0.0, not missing)

    def _rows(self, number: int) -> int:
        return min(VECTOR_PART_SAMPLES, self.samples.rows - number * VECTOR_PART_SAMPLES)

    def _make(self, head: Answering, number: int) -> None:
        started = time.monotonic()
        write_vectors(self.paths[number], self._block(head, number), key=self.artifact.key, started=started)

    def _block(self, head: Answering, number: int) -> Block:
        first, pieces = number * FEATURE_PARTS, []
        ids = torch.arange(number * VECTOR_PART_SAMPLES, number * VECTOR_PART_SAMPLES + self._rows(number))
        mean = feature_mean(self.context, self.samples)
        blocks = feature_blocks(self.context, self.samples, mean, first=first, last=first + FEATURE_PARTS)
        for some, phi in zip(ids.split(PART_ITEMS), blocks, strict=True):
            pieces.append(head.samples(some, phi).float())
        return Block(ids.numpy(), torch.cat(pieces).numpy())


def blocks_of(paths: Sequence[AnyPath], removed: NDArray[np.int64] | None = None) -> Iterator[Block]:
    """Yield parts in order, without the vectors of removed samples."""
    for path in paths:
        block = read_vectors(path)
        if removed is not None and len(removed):
            kept = ~np.isin(block.train_ids, removed)
            block = Block(block.train_ids[kept], block.vectors[kept])
        if len(block.train_ids):
            yield block
