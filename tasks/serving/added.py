"""Samples that were added to the served index since the published run: what the run made does not know them."""

from __future__ import annotations

import pyarrow as pa

from storage_schemas.snapshots.published import Published
from storage_schemas.tombstones import removed_ids
from storage_schemas.workspace import Workspace
from tasks.inputs.samples import samples_table

_SAME = ["train_id", "key", "image_sha256"]  # columns of a sample that stay as they are when others are added


def extends(table: pa.Table, before: pa.Table) -> bool:
    """Return whether a table of samples is another one, or that one with samples added behind its own."""
    return bool(table.select(_SAME).slice(0, len(before)).equals(before.select(_SAME)))


def samples_added(workspace: Workspace, published: Published) -> int:
    """Return how many samples the served index has behind the run's that are not taken down."""
    if published.samples is None or published.index_samples in (None, published.samples):
        return 0
    path = workspace.file(published.index_samples)
    table, before = samples_table(path), samples_table(workspace.file(published.samples))
    if not extends(table, before):
        return 0
    removed = removed_ids(workspace, path)
    return len(table) - len(before) - int((removed >= len(before)).sum())


def left_out(added: int, by: str) -> list[str]:
    """Return a line that says what is left out, none where nothing was added.

    Args:
        added: how many samples.
        by: what does not know them.
    """
    if not added:
        return []
    images = "1 training image was" if added == 1 else f"{added:,} training images were"
    return [f"{images} added to the index since the published run and left out here: {by}"]
