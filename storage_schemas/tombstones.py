"""Take-downs: a record of each, numbered and never changed, and the training samples that no reader shows any more.

`tombstones/<number>.json` is created, which fails where the number is taken, so that a take-down is there whole or not
at all. A wrong one is lifted by a further record. An image is known by the sha256 of its bytes: a sample of the same
bytes in a later table of samples is taken down, too. Tables on disk stay as they are: readers leave these samples out.

Each record holds the sha256 of the one before, so that none can be altered or left out unseen. A reader that cannot
read them all answers nothing, as it cannot know what to leave out.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas import tables
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, create, matching, read_if_there, sync_folders
from storage_schemas.workspace import Workspace

LAYOUT_VERSION = "1"
_NAME = re.compile(r"\d{5,}\.json")


class RemovedSample(BaseModel):
    """A sample that a take-down found, in one table of samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: str = Field(description="the table, relative to the workspace")
    train_id: int = Field(ge=0)
    key: str
    image_sha256: str = Field(description="of the image's bytes in the tar")


class Tombstone(BaseModel):
    """`tombstones/<number>.json`: a take-down, or one that lifts another: who, when, why, and what held the images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout_version: str = LAYOUT_VERSION
    number: int = Field(ge=1)
    previous_sha256: str = Field(description="of the record before; empty in the first")
    at: datetime
    by: str
    reason: str
    lifts: int | None = Field(default=None, description="the take-down that this record lifts; it removes nothing")
    removed: list[RemovedSample] = Field(default_factory=list, description="in every table that was searched")
    searched: list[str] = Field(default_factory=list, description="the tables of samples that there were")
    published: int = Field(default=0, description="number of what was published then; 0: nothing")
    indexes: list[str] = Field(default_factory=list, description="versions that hold a vector of it")
    heads: list[str] = Field(default_factory=list, description="versions that learned from its rank labels")
    runs: list[str] = Field(default_factory=list, description="those whose samples it was among")
    snapshots: list[str] = Field(default_factory=list, description="of these runs' rank labels")
    reports: list[str] = Field(default_factory=list, description="pages of these runs, which stay as they are")


class UnreadableTombstones(StoreError):
    """A record of a take-down is gone, damaged, or another release's: nobody can say what to leave out."""


@dataclass(frozen=True)
class Tombstones:
    """All take-downs of a workspace at one moment, by number."""

    records: tuple[Tombstone, ...] = ()
    sha256: str = ""  # of the newest record

    @property
    def number(self) -> int:
        """The newest record's number; 0 where there is none."""
        return len(self.records)

    @cached_property
    def active(self) -> tuple[Tombstone, ...]:
        """The take-downs that no later record lifted."""
        lifted = {record.lifts for record in self.records}
        return tuple(record for record in self.records if record.lifts is None and record.number not in lifted)

    @cached_property
    def images(self) -> frozenset[str]:
        """The sha256 of each image that is taken down."""
        return frozenset(each.image_sha256 for record in self.active for each in record.removed)


def read_tombstones(workspace: Workspace, known: Tombstones | None = None) -> Tombstones:
    """Read all take-downs.

    Args:
        known: what was read before, where only what came since is to be read: one look where nothing did.

    Raises:
        UnreadableTombstones: one is gone, damaged, or another release's.
    """
    if known is not None:
        found = known
        while (later := read_if_there(workspace.tombstone(found.number + 1))) is not None:
            found = _with(workspace, found, later)
        return found
    found = Tombstones()
    # One listing says which are there, and whether one of them is gone.
    paths = [path for path in matching(workspace.tombstones, "*.json") if _NAME.fullmatch(path.name)]
    numbers = sorted(int(path.stem) for path in paths)
    for place, number in enumerate(numbers, start=1):
        if number != place:
            raise _unreadable(workspace.tombstone(place), "it is gone")
    for content in _contents([workspace.tombstone(number) for number in numbers]):
        found = _with(workspace, found, content)
    return found


def removed_ids(
    workspace: Workspace,
    samples: AnyPath | str | None,
    tombstones: Tombstones | None = None,
) -> NDArray[np.int64]:
    """Return the train_ids of a table of samples that are taken down, ascending.

    Args:
        samples: path of the table, or its name relative to the workspace; None, of an imported run, has none.
        tombstones: as they were read; read anew unless given.

    Raises:
        UnreadableTombstones: see `read_tombstones`.
    """
    records = (tombstones or read_tombstones(workspace)).active
    if samples is None or not records:
        return np.empty(0, np.int64)
    table = samples if isinstance(samples, str) else workspace.relative(samples)
    ids = {each.train_id for record in records for each in record.removed if each.samples == table}
    later = {each.image_sha256 for record in records if table not in record.searched for each in record.removed}
    if later:
        ids |= {train_id for train_id, _, _ in samples_of_images(workspace.file(table), frozenset(later))}
    return np.array(sorted(ids), np.int64)


def without(rows: pa.Table, removed: NDArray[np.int64] | Sequence[int]) -> pa.Table:
    """Return the rows of a table with train_ids that are not about removed samples."""
    if not len(removed):
        return rows
    return rows.filter(pc.invert(pc.is_in(rows["train_id"], value_set=pa.array(removed, pa.int64()))))


@functools.lru_cache(maxsize=64)
def samples_of_images(path: AnyPath, images: frozenset[str]) -> tuple[tuple[int, str, str], ...]:
    """Return train_id, key and image_sha256 of a table's samples that are one of these images, by train_id.

    It may be cached, as a table of samples is never changed.
    """
    columns = ["train_id", "key", "image_sha256"]
    try:
        rows = tables.read(path, tables.SAMPLES, pc.field("image_sha256").isin(sorted(images)), columns=columns)
    except FileNotFoundError:
        raise StoreError(
            f"{path} is gone, so nobody knows which of its images are taken down: `fastgda run CONFIG` makes it again"
        ) from None
    return tuple(sorted((row["train_id"], row["key"], row["image_sha256"]) for row in rows.to_pylist()))


def create_tombstone(workspace: Workspace, before: Tombstones, record: Tombstone) -> Tombstones | None:
    """Write the next record; None where another writer came first, who has to be looked at before."""
    record = record.model_copy(update={"number": before.number + 1, "previous_sha256": before.sha256})
    path, content = workspace.tombstone(record.number), record.model_dump_json(indent=2).encode() + b"\n"
    if not create(path, content):
        return None
    sync_folders([path])
    return Tombstones((*before.records, record), _digest(content))


def _with(workspace: Workspace, before: Tombstones, content: bytes) -> Tombstones:
    path = workspace.tombstone(before.number + 1)
    try:
        record = Tombstone.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _unreadable(path, f"{'.'.join(map(str, first['loc'])) or 'all'}: {first['msg']}") from None
    if record.layout_version != LAYOUT_VERSION:
        raise _unreadable(path, f"layout {record.layout_version}, this release reads {LAYOUT_VERSION}")
    if record.number != before.number + 1:
        raise _unreadable(path, f"it says that it is number {record.number}")
    if record.previous_sha256 != before.sha256:
        raise _unreadable(path, "the record before is not what it was")
    return Tombstones((*before.records, record), _digest(content))


def _unreadable(path: AnyPath, why: str) -> UnreadableTombstones:
    why = "".join(sign for sign in why if sign.isprintable())
    return UnreadableTombstones(
        f"{path}: {why}: put the records of take-downs back from a backup; until then nothing is answered, as nobody "
        "can say which images to leave out"
    )


def _contents(paths: Sequence[AnyPath]) -> list[bytes]:
    """Read small files; those of an object store together."""
    if not paths or isinstance(paths[0], Path):
        return [path.read_bytes() for path in paths]
    places = [path.path for path in paths if not isinstance(path, Path)]
    found = paths[0].fs.cat(places, max_concurrency=1)  # see `read_whole`
    by_name = {key.rsplit("/", 1)[-1]: content for key, content in found.items()}
    return [by_name[path.name] for path in paths]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
