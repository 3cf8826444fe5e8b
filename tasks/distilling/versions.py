"""Find and read versions of rank heads and indexes."""

from __future__ import annotations

import logging
import shlex

from fastgda_core.errors import UsageError
from fastgda_core.ranking.head import RankHead, load_head
from storage_schemas.commit import committed, read_manifest
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, local_files, matching
from storage_schemas.heads.records import HEAD_FILE, HeadRecord, IndexRecord, read_head_record, read_index_record
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.head_space import recorded_space
from tasks.inputs.features import in_space

log = logging.getLogger("fastgda.heads")


def space_of_head(context: Context, head: HeadRecord) -> Context:
    """Return the context with the feature space of a head, whatever is configured since."""
    space = recorded_space(head, context.workspace, context.config.features.weights)
    return in_space(context, **space.model_dump(include={"space", "weights", "unit_length", "centre"}))


def load_trained_head(folder: AnyPath) -> RankHead:
    """Load a head version, from disk or from an object store."""
    return load_head(local_files(folder, (HEAD_FILE, "head.safetensors")))


def read_head(workspace: Workspace, version: str) -> tuple[Artifact, HeadRecord]:
    """Read a rank head and its record.

    Raises:
        UsageError: there is no such head.
    """
    folder = workspace.head(version)
    head = _committed(workspace, folder / "head.safetensors", version, "rank head", "SELECT head FROM heads")
    return head, read_head_record(folder)


def heads_of_run(workspace: Workspace, run: str) -> dict[str, Artifact]:
    """Return the newest head of each kind that learned from a run, newest first; none before one is trained.

    A head whose record cannot be read is named, and left out.
    """
    made = {
        path.parent: manifest.committed_at
        for path in matching(workspace.root / "heads", "*/head.safetensors")
        if (manifest := read_manifest(path)) is not None and manifest.committed_at is not None
    }
    found: dict[str, Artifact] = {}
    for folder in sorted(made, key=made.__getitem__, reverse=True):
        try:
            head, record = read_head(workspace, folder.name)
        except (UsageError, StoreError) as error:
            log.warning("head %s is left out: %s", folder.name, error)
            continue
        if record.run == run:
            found.setdefault(record.kind, head)
    return found


def read_index(workspace: Workspace, version: str) -> tuple[Artifact, IndexRecord]:
    """Read an index and its record.

    Raises:
        UsageError: there is no such index.
    """
    folder = workspace.index(version)
    index = _committed(workspace, folder / "index.faiss", version, "index", "SELECT index_version FROM indexes")
    return index, read_index_record(folder)


def _committed(workspace: Workspace, path: AnyPath, version: str, what: str, listing: str) -> Artifact:
    """Return the artifact that a committed file is of."""
    manifest = committed(path, version)
    if manifest is None:
        raise UsageError(f"no {what} {version!r}: {command(workspace, f'sql {shlex.quote(listing)}')} lists them")
    return Artifact(what, version, path.parent, manifest.rows)


def latest_head(workspace: Workspace) -> str:
    """Return the head that was trained last.

    Raises:
        UsageError: there is none.
    """
    return _latest(matching(workspace.root / "heads", "*/head.safetensors"), "rank head", "train")


def latest_index(workspace: Workspace) -> str:
    """Return the index that was built last.

    Raises:
        UsageError: there is none.
    """
    return _latest(matching(workspace.root / "indexes", "*/index.faiss"), "index", "index build")


def _latest(paths: list[AnyPath], what: str, command: str) -> str:
    made = {path.parent.name: manifest.committed_at for path in paths if (manifest := read_manifest(path))}
    ages = {version: at for version, at in made.items() if at is not None}
    if not ages:
        raise UsageError(f"the workspace has no {what} yet: `fastgda {command} CONFIG` makes one")
    return max(ages, key=lambda version: ages[version])
