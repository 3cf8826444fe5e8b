"""The training samples that answers name: their facts, images and filters, without those that are taken down."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from storage_schemas.files import AnyPath
from storage_schemas.sql.filters import SampleFilters
from storage_schemas.sql.sample_columns import SampleColumn
from storage_schemas.tombstones import Tombstones, read_tombstones, removed_ids
from storage_schemas.workspace import Workspace
from tasks.inputs.samples import samples_table
from tasks.serving.answers import Hit
from tasks.serving.folding import Looks

_FACTS = ["train_id", "key", "captions", "shard", "offset", "metadata"]  # columns that a hit tells
_FACTS_KEPT = 20_000  # samples whose facts are kept as they were named: 20 MB
_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


class UnknownSample(UsageError):
    """There is no such training sample."""


class RemovedSample(UsageError):
    """The training sample is taken down: nothing of it is shown."""


class Present(NamedTuple):
    """Whether each sample is not taken down, (n,), None: none is; and the newest take-down that this knows of."""

    mask: NDArray[np.bool_] | None
    take_down: int


class Catalogue:
    """One table of samples, as answers see it; concurrent calls may share it."""

    def __init__(self, workspace: Workspace, path: AnyPath) -> None:
        self.workspace, self.path = workspace, path
        self.table = samples_table(path)
        self.looks = Looks(self.table)
        self._facts = self.table.select(_FACTS)
        self._named: dict[int, dict[str, Any]] = {}
        self._filters = SampleFilters(self.table)
        self._lock = threading.Lock()
        self._tombstones: Tombstones | None = None
        self._present = Present(None, 0)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def columns(self) -> list[SampleColumn]:
        """The columns by which samples can be filtered and summed."""
        return self._filters.columns

    def allowed(
        self, present: Present, where: str | None = None, exclude: Iterable[int] = ()
    ) -> NDArray[np.bool_] | None:
        """Return whether a call may name each sample, (n,); None where it may name all.

        Args:
            present: who is there, as the call saw it.
            where: an SQL expression over the columns of `samples`.
            exclude: train_ids that are not to be named.

        Raises:
            UsageError: the expression is none, or a train_id does not exist.
        """
        found = present.mask
        if where is not None and where.strip():
            chosen = self._filters.bitmap(where)
            found = chosen if found is None else found & chosen
        left_out = np.array(list(exclude), dtype=np.int64)
        if len(left_out):
            for train_id in left_out[(left_out < 0) | (left_out >= len(self))].tolist()[:1]:
                raise UnknownSample(self._unknown(train_id))
            found = np.ones(len(self), np.bool_) if found is None else found.copy()
            found[left_out] = False
        return found

    def present(self) -> Present:
        """Look whether there is a newer take-down, and return who is left."""
        with self._lock:
            newest = read_tombstones(self.workspace, self._tombstones)
            if self._tombstones is None or newest.number != self._tombstones.number:
                removed = removed_ids(self.workspace, self.path, newest)
                mask = np.ones(len(self), np.bool_)
                mask[removed] = False
                self._present = Present(mask if len(removed) else None, newest.number)
                self._tombstones = newest
            return self._present

    def hits(
        self, train_ids: Sequence[int], *, duplicates: Sequence[list[int]] = (), **figures: Sequence[float | None]
    ) -> list[Hit]:
        """Return samples as hits, ranked from 1 in the order given.

        Args:
            train_ids: whose.
            duplicates: what is folded under each.
            figures: further fields of the hits, one value for each.
        """
        facts, found = self._facts_of(train_ids), []
        for place, train_id in enumerate(train_ids):
            more: dict[str, Any] = {name: values[place] for name, values in figures.items()}
            if duplicates:
                more["duplicates"] = duplicates[place]
            found.append(Hit(place + 1, **facts[train_id], **more))
        return found

    def _facts_of(self, train_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Return the facts of samples, by train_id, and of others; those that were named lately are at hand."""
        named = self._named
        if len(named) > _FACTS_KEPT:
            named = self._named = {}
        if new := [train_id for train_id in train_ids if train_id not in named]:
            rows = self._facts.take(pa.array(new, pa.int64())).to_pylist()
            named.update(zip(new, map(_facts, rows), strict=True))
        return named

    def sample(self, train_id: int) -> Hit:
        """Return the facts of one sample, with rank 0.

        Raises:
            UnknownSample: there is none.
            RemovedSample: it is taken down.
        """
        return Hit(0, **_facts(self._row(train_id)))

    def size_of(self, train_id: int) -> tuple[int, int]:
        """Return width and height of a sample's image in pixels; errors as of `sample`."""
        row = self._row(train_id)
        return row["width"], row["height"]

    def picture(self, train_id: int) -> tuple[bytes, str]:
        """Return a sample's image as it lies in its tar, and its content type.

        Raises:
            UnknownSample, RemovedSample: as `sample`.
            UsageError: the tar is gone, or holds other bytes there.
        """
        row = self._row(train_id)
        try:
            with Path(row["shard"]).open("rb") as file:
                file.seek(row["offset"])
                content = file.read(row["size"])
        except OSError as error:
            raise UsageError(f"{row['shard']}: {error.strerror}: put the tar back where it was") from error
        if hashlib.sha256(content).hexdigest() != row["image_sha256"]:
            raise UsageError(f"{row['shard']}: the image {row['key']} changed since it was indexed: restore the tar")
        return content, kind_of(content)

    def _row(self, train_id: int) -> dict[str, Any]:
        if not 0 <= train_id < len(self):
            raise UnknownSample(self._unknown(train_id))
        mask = self.present().mask
        if mask is not None and not mask[train_id]:
            raise RemovedSample(f"training sample {train_id} is taken down: nothing of it is shown")
        row: dict[str, Any] = self.table.slice(train_id, 1).to_pylist()[0]
        return row

    def _unknown(self, train_id: int) -> str:
        return f"there is no training sample {train_id}: train_ids go from 0 to {len(self) - 1:,}"


def kind_of(content: bytes) -> str:
    """Return an image's content type, by its first bytes."""
    return next((kind for start, kind in _SIGNATURES.items() if content.startswith(start)), "application/octet-stream")


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of samples as fields of a hit."""
    told = {name: row[name] for name in ("train_id", "key", "captions", "shard", "offset")}
    return {**told, "metadata": json.loads(row["metadata"]) if row.get("metadata") else {}}
