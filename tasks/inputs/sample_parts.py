"""Reading and checking the tars in parts, each by whichever worker comes to it.

A part is some small tars, or a share of a large one. An image is decoded once for all that is kept of it: its size, its
hash, and how it looks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from storage_schemas.files import AnyPath, stamps
from storage_schemas.sample_plan import (
    KIND,
    Piece,
    SamplePart,
    SamplePlan,
    committed_sample_parts,
    read_sample_plan,
    write_sample_plan,
)
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.inputs.coco import files_behind
from tasks.inputs.tars import RULES, ShardSample, scan_shard
from tasks.parts import Parts

PART_BYTES = 2**28  # of tars: some thousands of images, a minute or two of one core
MOST_SHARES = 64  # of one tar, whose headers are read once for each
_OF_REJECTED: dict[str, Any] = {
    **{"offset": 0, "size": 0, "captions": [], "width": 0, "height": 0},
    **{"image_sha256": "", "image_look": b"", "metadata": "", "pictures": 0},
}


class SampleParts(Parts):
    """What the tars of a data set hold, in order: samples, and what could not be used."""

    kind = KIND
    title = "samples, in MB of tars"

    def __init__(self, workspace: Workspace, key: str, plan: SamplePlan) -> None:
        self.workspace, self.plan = workspace, plan
        self.artifact = Artifact("samples", key, workspace.sample_parts, sum(map(self.rows, range(len(plan.parts)))))

    @classmethod
    def of(cls, workspace: Workspace, key: str, shards: Sequence[Path]) -> SampleParts:
        """Return the parts of some tars, whose index has this key; nothing is written."""
        return cls(workspace, key, cut(shards))

    @classmethod
    def planned(cls, workspace: Workspace, key: str) -> SampleParts:
        """Return the parts as their coordinator cut them.

        Raises:
            UsageError: the plan is gone.
        """
        plan = read_sample_plan(workspace, key)
        if plan is None:
            raise UsageError(f"{workspace.sample_plan(key)} is gone: start the command that reads the tars again")
        return cls(workspace, key, plan)

    def keep_plan(self) -> None:
        """Write the plan, by which workers know the parts."""
        write_sample_plan(self.workspace, self.artifact.key, self.plan)

    @property
    def count(self) -> int:
        return len(self.plan.parts)

    def path(self, number: int) -> AnyPath:
        return self.workspace.sample_part(self.key(number))

    def key(self, number: int) -> str:
        return self.plan.parts[number].key

    def rows(self, number: int) -> int:
        """Return the part's megabytes: how many samples it has shows when it is read."""
        return max(1, self.plan.parts[number].size // 10**6)

    def make(self, number: int) -> Manifest:
        started = time.monotonic()
        rows = self.scanned(number)
        return commit_table(self.path(number), rows, tables.SCANNED, key=self.key(number), started=started)

    def scanned(self, number: int) -> pa.Table:
        """Read a part of the tars, rows of `tables.SCANNED`, and write nothing."""
        pieces = self.plan.parts[number].pieces
        found = chain.from_iterable(scan_shard(Path(each.shard), each.share, each.of) for each in pieces)
        rows = [asdict(item) | ({"reason": ""} if isinstance(item, ShardSample) else _OF_REJECTED) for item in found]
        return pa.Table.from_pylist(rows, schema=tables.SCANNED.schema)

    def committed(self) -> dict[int, Manifest]:
        return dict(committed_sample_parts(self.workspace, self.plan))


def cut(shards: Sequence[Path]) -> SamplePlan:
    """Return the parts that some tars are read in.

    A tar that is larger than a part is cut into shares. Of smaller ones several are a part, and each ends it with a
    chance of its bytes in those of a part, which is drawn from its path: so parts stay what they are, but for the one
    or two next to it, when a tar is added, grows or goes.
    """
    parts: list[SamplePart] = []
    open_part: list[tuple[Piece, str, int]] = []  # with the stamp and size of each

    def close() -> None:
        if open_part:
            parts.append(_part(open_part))
            open_part.clear()

    for shard in shards:
        stamp, size = _stamp(shard)
        if size > PART_BYTES:
            close()
            shares = min(MOST_SHARES, -(-size // PART_BYTES))
            for share in range(shares):
                parts.append(_part([(Piece(shard=str(shard), share=share, of=shares), stamp, size // shares)]))
            continue
        open_part.append((Piece(shard=str(shard)), stamp, size))
        if _ends_a_part(shard, size) or sum(each for *_, each in open_part) > 2 * PART_BYTES:
            close()
    close()
    return SamplePlan(parts=tuple(parts))


def _part(pieces: Sequence[tuple[Piece, str, int]]) -> SamplePart:
    key = input_key("part of samples", RULES, [(piece, stamp) for piece, stamp, _ in pieces], table=tables.SCANNED)
    return SamplePart(key=key, size=sum(size for *_, size in pieces), pieces=tuple(piece for piece, *_ in pieces))


def _stamp(shard: Path) -> tuple[str, int]:
    """Return what changes when a tar does, or a caption file or one of its pictures, and the bytes to be read."""
    of_files = stamps(files_behind([shard]))
    return input_key("stamps", of_files), sum(size for _, size, _ in of_files)


def _ends_a_part(shard: Path, size: int) -> bool:
    drawn = int.from_bytes(hashlib.sha256(str(shard).encode(errors="surrogateescape")).digest()[:8])
    return drawn * PART_BYTES < size * 2**64
