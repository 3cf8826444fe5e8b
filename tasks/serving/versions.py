"""What an answer was made of."""

from __future__ import annotations

from storage_schemas.commit import read_manifest
from storage_schemas.heads.records import read_index_record
from storage_schemas.snapshots.published import Published
from storage_schemas.workspace import Workspace
from tasks.serving.answers import Versions


def served_versions(workspace: Workspace, published: Published) -> Versions:
    """Return the versions of a published state; of an index what its record says of it."""
    head = published.head_version or None
    if published.index is None:
        return Versions(published.version, published.run, published.snapshot, head, None)
    index = workspace.file(published.index)
    record, manifest = read_index_record(index), read_manifest(index / "index.faiss")
    return Versions(
        published.version,
        published.run,
        published.snapshot,
        head,
        index.name,
        index_kind=record.kind,
        vectors=manifest.rows if manifest else 0,
        recall_at_10=record.recall_at_10,
        recall_at_100=record.recall_at_100,
    )
