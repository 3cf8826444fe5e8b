"""Find and read versions of rank heads and indexes."""

from __future__ import annotations

import json
import shlex
from typing import Any

from fastgda_core.errors import UsageError
from fastgda_core.ranking.head import RankHead, load_head
from storage_schemas.commit import committed, read_manifest
from storage_schemas.files import AnyPath, local_files, matching
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.head_space import described_space
from tasks.inputs.features import (
    in_space,
)


def space_of_head(context: Context, description: dict[str, Any]) -> Context:
    """The context with the feature space of a head, whatever is configured since."""
    space = described_space(description, context.workspace, context.config.features.weights)
    return in_space(context, **space.model_dump(include={"space", "weights", "unit_length", "centre"}))


def load_trained_head(folder: AnyPath) -> RankHead:
    """A head version, from disk or from an object store."""
    return load_head(local_files(folder, ("head.json", "head.safetensors")))


def read_head(workspace: Workspace, version: str) -> tuple[Artifact, dict[str, Any]]:
    """A trained head as an artifact, and its `head.json`.

    Raises:
        UsageError: there is no such head.
    """
    return _read(
        workspace, workspace.head(version) / "head.safetensors", version, "rank head", "SELECT head FROM heads"
    )


def read_index_head(workspace: Workspace, version: str) -> tuple[Artifact, str]:
    """A built index as an artifact, and the version of the head whose vectors it holds.

    Raises:
        UsageError: there is no such index.
    """
    path = workspace.index(version) / "index.faiss"
    stage_, description = _read(workspace, path, version, "index", "SELECT index_version FROM indexes")
    return stage_, description["head"]


def _read(
    workspace: Workspace, path: AnyPath, version: str, what: str, listing: str
) -> tuple[Artifact, dict[str, Any]]:
    """The artifact that a committed file is of, and the JSON file that describes it."""
    manifest = committed(path, version)
    if manifest is None:
        raise UsageError(f"no {what} {version!r}: {command(workspace, f'sql {shlex.quote(listing)}')} lists them")
    description = json.loads(path.with_suffix(".json").read_text())
    return Artifact(what, version, path.parent, manifest.rows), description


def latest_head(workspace: Workspace) -> str:
    """The head that was trained last.

    Raises:
        UsageError: there is none.
    """
    return _latest(matching(workspace.root / "heads", "*/head.safetensors"), "rank head", "train")


def latest_index(workspace: Workspace) -> str:
    """The index that was built last.

    Raises:
        UsageError: there is none.
    """
    return _latest(matching(workspace.root / "indexes", "*/index.faiss"), "index", "index")


def _latest(paths: list[AnyPath], what: str, command: str) -> str:
    made = {path.parent.name: manifest.committed_at for path in paths if (manifest := read_manifest(path))}
    ages = {version: at for version, at in made.items() if at is not None}
    if not ages:
        raise UsageError(f"the workspace has no {what} yet: `fastgda {command} CONFIG` makes one")
    return max(ages, key=lambda version: ages[version])
