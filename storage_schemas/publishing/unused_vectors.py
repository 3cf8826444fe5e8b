"""Delete vectors that no index was built from, or none that is left."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from storage_schemas.commit import MANIFEST
from storage_schemas.files import AnyPath, matching, remove, remove_folder
from storage_schemas.heads.records import INDEX_FILE, read_index_record
from storage_schemas.listings import list_tree
from storage_schemas.runs.lease import under_way
from storage_schemas.workspace import Workspace

BUILDING = timedelta(days=1)  # after which vectors that no index names are not those of a build that goes on
_PART = re.compile(rf"part-\d{{5,}}\.parquet({re.escape(MANIFEST)})?")
_KEY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Unused:
    """Vectors by their key, and the bytes of their files."""

    key: str
    size: int


def prune_vectors(
    workspace: Workspace, gone: Collection[str] = (), *, older_than: timedelta = BUILDING, dry_run: bool = False
) -> list[Unused]:
    """Delete vectors that no index names; they can be made again from their head.

    Those of a build under way stay: what was written within `older_than`, and everything while some process holds a
    lease. Folders of other names, with other files, or behind a link are left alone.

    Args:
        gone: index versions that count as deleted.
    """
    if under_way(workspace, older_than):
        return []
    before, named = datetime.now(UTC) - older_than, _named(workspace, gone)
    found: dict[str, dict[str, int]] = {}
    for path, entry in list_tree(workspace.root / "vectors").items():
        key, _, name = path.partition("/")
        found.setdefault(key, {})[name] = entry.size
    unused = []
    for key, sizes in sorted(found.items()):
        folder = workspace.vectors(key)
        ours = _KEY.fullmatch(key) and all(map(_PART.fullmatch, sizes))
        if not ours or key in named or _linked(folder):
            continue
        if max((folder / name).stat().st_mtime for name in sizes) >= before.timestamp():
            continue
        unused.append(Unused(key, sum(sizes.values())))
        if not dry_run:
            # Manifests first: what is half deleted is made again, not taken for whole.
            for name in sorted(sizes, key=lambda name: not name.endswith(MANIFEST)):
                remove(folder / name)
            remove_folder(folder)
    return unused


def _named(workspace: Workspace, gone: Collection[str]) -> set[str]:
    """Return the keys that records of indexes name, those of indexes that are not finished among them."""
    folders = [path.parent for path in matching(workspace.root / "indexes", f"*/{INDEX_FILE}")]
    return {key for folder in folders if folder.name not in gone for key in read_index_record(folder).vectors}


def _linked(folder: AnyPath) -> bool:
    return isinstance(folder, Path) and (folder.is_symlink() or folder.parent.is_symlink())
