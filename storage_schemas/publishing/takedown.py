"""Take training images down, and lift a take-down that was wrong: one record each, which every reader honours at once.

Nothing is deleted and no table is written anew. What was made of an image before (indexes, heads, runs, pages) is named
in the record, so that it can be made again without the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from storage_schemas import tables
from storage_schemas.errors import StoreError
from storage_schemas.files import matching
from storage_schemas.heads.records import indexed_tables, taught_by
from storage_schemas.indexed_samples import read_indexed
from storage_schemas.runs.ledger import read_run, run_names
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.sql.views import write_catalog
from storage_schemas.tombstones import (
    RemovedSample,
    Tombstone,
    Tombstones,
    create_tombstone,
    read_tombstones,
    samples_of_images,
)
from storage_schemas.workspace import Workspace

REASON_LETTERS = 2000  # of a reason or a name: a record is read by people


class NoSuchSample(StoreError):
    """A train_id is none of the published samples."""


class CannotLift(StoreError):
    """A take-down cannot be lifted: there is none of this number, or it is lifted already."""


@dataclass(frozen=True)
class TakeDown:
    """A take-down before it is written.

    asked: the samples that were named, of the published table.
    record: what is written, with the same images in every other table of samples, and what holds them.
    already: numbers of earlier take-downs of named samples, by train_id; these are not in `asked`.
    """

    asked: list[RemovedSample]
    record: Tombstone
    already: dict[int, int]


def plan_take_down(workspace: Workspace, train_ids: Sequence[int], *, reason: str, by: str) -> TakeDown:
    """Find what a take-down of these samples would hide, and what holds them. Nothing is written.

    Args:
        train_ids: of the published samples, or before anything is published of those indexed last.

    Raises:
        NoSuchSample: one of them is none of these samples.
        StoreError: there are no samples, or the reason or the name is empty or too long.
    """
    return _planned(workspace, read_tombstones(workspace), train_ids, _said("--reason", reason), _said("--by", by))


def take_down(workspace: Workspace, train_ids: Sequence[int], *, reason: str, by: str) -> TakeDown:
    """Take samples down, in one step; those that are down already stay as they are.

    Raises:
        NoSuchSample, StoreError: see `plan_take_down`.
    """
    reason, by = _said("--reason", reason), _said("--by", by)
    while True:
        before = read_tombstones(workspace)
        planned = _planned(workspace, before, train_ids, reason, by)
        after = create_tombstone(workspace, before, planned.record) if planned.asked else before
        if after is not None:
            _show(workspace)  # also where nothing is new: who wrote the record may have died before this
            return TakeDown(planned.asked, after.records[-1] if planned.asked else planned.record, planned.already)


def lift(workspace: Workspace, number: int, *, reason: str, by: str) -> Tombstone:
    """Lift a take-down by a further record, so that its samples are seen again; return that record.

    Samples that another take-down removed too stay hidden.

    Raises:
        CannotLift: there is no take-down of this number, or it is lifted already.
    """
    reason, by = _said("--reason", reason), _said("--by", by)
    while True:
        before = read_tombstones(workspace)
        known = {record.number: record for record in before.records}
        if number not in known or known[number].lifts is not None:
            numbers = ", ".join(str(record.number) for record in before.active) or "none"
            raise CannotLift(f"there is no take-down {number} to lift; in force: {numbers}")
        if (later := next((record for record in before.records if record.lifts == number), None)) is not None:
            _show(workspace)
            raise CannotLift(f"take-down {number} is lifted already, by record {later.number} ({later.by})")
        record = Tombstone(number=1, previous_sha256="", at=datetime.now(UTC), by=by, reason=reason, lifts=number)
        after = create_tombstone(workspace, before, record)
        if after is not None:
            _show(workspace)
            return after.records[-1]


def _show(workspace: Workspace) -> None:
    """Write the catalog anew, whose views leave out what is taken down; nothing else on disk depends on it."""
    try:
        write_catalog(workspace)
    except NotPublished:
        return


def _said(what: str, text: str) -> str:
    text = " ".join(text.split())
    if not text:
        raise StoreError(f"{what} is empty: the record of a take-down says who wanted it and why")
    if len(text) > REASON_LETTERS:
        raise StoreError(f"{what} has {len(text)} letters: say it in at most {REASON_LETTERS}")
    if text != text.encode(errors="replace").decode():
        raise StoreError(f"{what} holds bytes that are no text")
    return text


def _planned(workspace: Workspace, before: Tombstones, train_ids: Sequence[int], reason: str, by: str) -> TakeDown:
    chosen, number = _samples(workspace)
    rows = {row.train_id: row for row in _named(workspace, chosen, train_ids)}
    already = {
        train_id: earlier
        for train_id, row in rows.items()
        if (earlier := _earlier(before, row.image_sha256)) is not None
    }
    asked = [row for train_id, row in rows.items() if train_id not in already]
    searched = sorted(workspace.relative(path) for path in matching(workspace.root / "samples", "*/samples.parquet"))
    images = frozenset(row.image_sha256 for row in asked)
    removed = [
        RemovedSample(samples=table, train_id=train_id, key=key, image_sha256=image)
        for table in (searched if images else [])
        for train_id, key, image in samples_of_images(workspace.file(table), images)
    ]
    record = Tombstone(
        number=1,
        previous_sha256="",
        at=datetime.now(UTC),
        by=by,
        reason=reason,
        removed=removed,
        searched=searched,
        published=number,
    )
    holders = _holders(workspace, {each.samples for each in removed})
    return TakeDown(asked, record.model_copy(update=holders), already)


def _earlier(before: Tombstones, image: str) -> int | None:
    return next(
        (record.number for record in before.active for each in record.removed if each.image_sha256 == image), None
    )


def _samples(workspace: Workspace) -> tuple[str, int]:
    """Return the table whose train_ids people see, and the number of what is published."""
    try:
        published = read_published(workspace)
    except NotPublished:
        indexed = read_indexed(workspace)
        if indexed is None:
            raise
        return indexed.samples, 0
    samples = published.index_samples or published.samples
    if samples is None:
        raise NoSuchSample(
            f"run {published.run} was imported without its samples, so no image is known by a train_id: "
            "`fastgda import-release --samples` names their table"
        )
    return samples, published.version


def _named(workspace: Workspace, samples: str, train_ids: Sequence[int]) -> list[RemovedSample]:
    columns = ["train_id", "key", "image_sha256"]
    every = tables.read(workspace.file(samples), tables.SAMPLES, columns=columns)
    unknown = sorted({train_id for train_id in train_ids if not 0 <= train_id < every.num_rows})
    if unknown:
        raise NoSuchSample(
            f"there is no train_id {unknown[0]}: {samples} has {every.num_rows:,} samples, numbered from 0"
        )
    chosen = every.take(pa.array(dict.fromkeys(train_ids), pa.int64())).to_pylist()
    return [RemovedSample(samples=samples, **row) for row in chosen]


def _holders(workspace: Workspace, samples: set[str]) -> dict[str, list[str]]:
    """Return what was made of these tables of samples: index versions, heads, runs, snapshots, pages."""
    runs = [run for run in run_names(workspace) if read_run(workspace, run).samples in samples]
    pages = [workspace.report(run) for run in runs]
    return {
        "indexes": [name for name, table in indexed_tables(workspace).items() if table in samples],
        "heads": [name for name, run in taught_by(workspace).items() if run in runs],
        "runs": runs,
        "snapshots": [name for name, held in _snapshots(workspace).items() if not held.isdisjoint(runs)],
        "reports": [workspace.relative(page) for page in pages if page.exists()],
    }


def _snapshots(workspace: Workspace) -> dict[str, set[str]]:
    """Return the runs of each snapshot, by its name."""
    names = [path.stem for path in matching(workspace.root / "snapshots", "*.json")]
    return {name: set(read_snapshot(workspace, name).runs) for name in names}
