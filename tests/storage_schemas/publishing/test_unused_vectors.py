"""Vectors that no index names are deleted, unless somebody may be about to build of them."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

from storage_schemas.commit import commit
from storage_schemas.publishing.serving import promote_index, prune_indexes
from storage_schemas.publishing.unused_vectors import Unused, prune_vectors
from storage_schemas.runs.lease import sole_maker
from storage_schemas.workspace import Workspace, part
from tests.storage_schemas.workspaces import commit_index, publish_run


def keep_vectors(workspace: Workspace, key: str, *, days: float = 2.0) -> int:
    """Commit two parts that were written so long ago; return the bytes of all files."""
    for number in range(2):
        path = part(workspace.vectors(key), number)
        commit(path, lambda path: path.write_bytes(b"vectors"), key=key, rows=1, started=0.0)
    then, files = time.time() - days * 86_400, list(Path(str(workspace.vectors(key))).iterdir())
    for file in files:
        os.utime(file, (then, then))
    return sum(file.stat().st_size for file in files)


def test_vectors_go_with_the_last_version_that_names_them(tmp_path: Path) -> None:
    samples, workspace = publish_run(tmp_path).samples or "", Workspace(tmp_path)
    one, other, alone, young = ("1" * 16, "2" * 16, "3" * 16, "4" * 16)
    sizes = {key: keep_vectors(workspace, key) for key in (one, other, alone)}
    sizes[young] = keep_vectors(workspace, young, days=0.5)
    keep_vectors(workspace, "theirs")
    (tmp_path / "vectors" / "notes").mkdir()
    for version, keys in (("a", [one]), ("b", [other]), ("c", [other])):
        commit_index(workspace, version, samples, head=f"head-{version}", kind="Flat", vectors=keys)
        promote_index(workspace, version, force=True)
    assert prune_vectors(workspace, dry_run=True) == [Unused(alone, sizes[alone])]

    gone = [each.version for each in prune_indexes(workspace, 1, dry_run=True)]
    expected = [Unused(key, sizes[key]) for key in (one, alone)]
    assert prune_vectors(workspace, gone, dry_run=True) == expected and workspace.vectors(one).exists()

    with sole_maker(workspace, "an index", lambda: False, print):  # a build of any of them may have begun
        assert prune_vectors(workspace, gone) == []
    prune_indexes(workspace, 1)
    assert prune_vectors(workspace) == expected
    assert {path.name for path in (tmp_path / "vectors").iterdir()} == {other, young, "theirs", "notes"}
    assert prune_vectors(workspace, older_than=timedelta(hours=1)) == [Unused(young, sizes[young])]


def test_vectors_behind_a_link_stay(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    keep_vectors(Workspace(tmp_path / "another"), "1" * 16)
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "vectors").symlink_to(tmp_path / "another" / "vectors")
    assert prune_vectors(workspace) == []
