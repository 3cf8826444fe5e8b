"""Publish runs to readers, and retract them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from storage_schemas.files import create, read_if_there, remove, sync_folders, write_atomically
from storage_schemas.runs.ledger import published_versions, read_run
from storage_schemas.runs.records import Part
from storage_schemas.snapshots.published import (
    LAYOUT_VERSION,
    NOTHING,
    NotPublished,
    OtherRelease,
    Published,
    Served,
    listed_version,
    newest_version,
    parsed,
    read_published,
)
from storage_schemas.snapshots.snapshots import Snapshot, make_snapshot, read_snapshot
from storage_schemas.sql.views import write_catalog
from storage_schemas.workspace import Workspace

SERVED_KEPT = 50  # versions that a rollback can lead back through


def publish_runs(
    workspace: Workspace,
    runs: list[str],
    *,
    add: bool = False,
    exact_check: str | None = None,
    incomplete: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> Published:
    """Publish the rows of these runs to readers, in one step; with `add`, beside what is published then.

    The head and index that are served stay, as long as a train_id means the same image, until others are promoted.
    Metrics and the exact check stay only where the snapshot stays the same.

    Raises:
        CannotPublish, RunUnfinished: see `make_snapshot`.
    """

    known: dict[tuple[str, frozenset[str]], list[Part]] = {}

    def change(before: Published | None) -> Published:
        there = read_snapshot(workspace, before.snapshot).runs if add and before else []
        together = [*(run for run in there if run not in runs), *runs]
        snapshot = make_snapshot(workspace, together, incomplete=incomplete, advance=advance, known=known)
        return _showing(workspace, snapshot, before, exact_check)

    published = update_published(workspace, change)
    assert published is not None
    return published


def _showing(
    workspace: Workspace, snapshot: Snapshot, before: Published | None, exact_check: str | None = None
) -> Published:
    """Return the published state with this snapshot, and with what still holds of the state before."""
    records = [read_run(workspace, run) for run in snapshot.runs]
    last = records[-1]
    kept = before if before is not None and before.snapshot == snapshot.snapshot else None
    served = before if before is not None and before.samples == last.samples else None
    # What answered comes back by a rollback when its data is published again.
    history = [] if before is None else before.served_before if served else with_served(before)
    return Published(
        layout_version=LAYOUT_VERSION,
        snapshot=snapshot.snapshot,
        run=last.run,
        teacher=last.teacher,
        created_at=kept.created_at if kept else datetime.now(UTC),
        samples=last.samples,
        rejected_samples=last.rejected_samples,
        queries=list(dict.fromkeys(record.queries for record in records if record.queries)),
        candidates=list(dict.fromkeys(record.candidates for record in records if record.candidates)),
        base_losses=last.base_losses,
        exact_check=exact_check if exact_check or kept is None else kept.exact_check,
        metrics=kept.metrics if kept else None,
        study=kept.study if kept else None,
        compared_heads=kept.compared_heads if kept else None,
        head=served.head if served else None,
        index=served.index if served else None,
        index_samples=served.index_samples if served else None,
        served_before=history,
        pruned=before.pruned if before else [],
        snapshot_before=kept.snapshot_before if kept else before.snapshot if before else None,
        config=last.config,
    )


def with_served(published: Published) -> list[Served]:
    """Return where a rollback leads from what is served now on, when something else is served."""
    before = published.served_before
    if published.index is None or published.head is None or published.index_samples is None:
        return before
    now = Served(
        index=published.index,
        head=published.head,
        index_samples=published.index_samples,
        metrics=published.metrics,
        snapshot=published.snapshot,
    )
    return [*before, now][-SERVED_KEPT:]


def retract_run(workspace: Workspace, run: str) -> Published | None:
    """Take a run's rows out of what readers see, in one step; rows that it had replaced come back.

    Returns:
        What is published now; None when nothing is left: then readers are told that nothing is published.

    Raises:
        NotPublished: the run is not in the published snapshot.
    """

    known: dict[tuple[str, frozenset[str]], list[Part]] = {}

    def change(before: Published | None) -> Published | None:
        runs = read_snapshot(workspace, (before or read_published(workspace)).snapshot).runs
        if run not in runs:
            raise NotPublished(f"run {run} is not published; the published snapshot holds: {', '.join(runs)}")
        left = [name for name in runs if name != run]
        return _showing(workspace, make_snapshot(workspace, left, known=known), before) if left else None

    return update_published(workspace, change)


def update_published(workspace: Workspace, change: Callable[[Published | None], Published | None]) -> Published | None:
    """Replace what readers see, in one step, by what `change` makes of it.

    Args:
        change: takes the published state and returns the new one. It is given None where nothing is published or
            another release published; it returns None to publish nothing. It is called again where another writer came
            first.

    Returns:
        What is published now.
    """
    look = newest_version
    while True:
        number, content = look(workspace)
        look = listed_version  # by then another writer came first, or the pointer led to a version long past
        try:
            before = None if content is None else parsed(workspace, content)
        except OtherRelease:
            before = None
        if before is not None and before.version == 0:
            # What an earlier release published becomes a numbered version first: as long as `current.json` has no
            # number, readers do not see newer versions.
            before = before.model_copy(update={"version": number + 1})
            if _created(workspace, number + 1, before):
                write_atomically(workspace.current, _written(before))
            continue
        after = change(before)
        if _same(before, after):
            # What another release wrote is left as it is.
            if (before is not None or content is None) and not _is_settled(workspace, content):
                _settle(workspace, number)
            return before
        if after is not None:
            after = after.model_copy(update={"version": number + 1})
        if _created(workspace, number + 1, after):
            _settle(workspace, number + 1)
            return after


def _written(published: Published | None) -> bytes:
    return NOTHING if published is None else published.model_dump_json(indent=2).encode() + b"\n"


def _same(before: Published | None, after: Published | None) -> bool:
    if before is None or after is None:
        return before is after
    return before == after.model_copy(update={"version": before.version})


def _created(workspace: Workspace, number: int, published: Published | None) -> bool:
    """Create the version of that number; return False where another writer came first."""
    place = workspace.published(number)
    if not create(place, _written(published)):
        return False
    sync_folders([place])
    # A writer that slept while a hundred others wrote may have taken the number of an old one that is vacuumed.
    numbers = published_versions(workspace)
    if numbers[-1] > number and number + 1 not in numbers:
        remove(place)
        return False
    return True


def _is_settled(workspace: Workspace, content: bytes | None) -> bool:
    """Return whether the pointer is this version's already and no catalog, which shows more, has to follow."""
    return not isinstance(workspace.root, Path) and read_if_there(workspace.current) == content


def _settle(workspace: Workspace, number: int) -> None:
    """Write `current.json` and the catalog of the version, unless a newer version is there, whose writer does so.

    A slow writer may replace a newer `current.json` by an older one. So each writer looks again after it wrote, and
    writes again until it wrote the newest: the last writer leaves the newest version.
    """
    newest, content = newest_version(workspace)
    if newest != number:
        return
    written = -1
    while written != newest:
        if content is None:
            remove(workspace.current)
            remove(workspace.catalog)
        else:
            if content != read_if_there(workspace.current):
                write_atomically(workspace.current, content)
            write_catalog(workspace)
        written = newest
        newest, content = listed_version(workspace)
