"""Remove what no reader and no run needs any more."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from storage_schemas.commit import manifest_path
from storage_schemas.files import AnyPath, file_sha256, leftovers, matching, read_whole, remove
from storage_schemas.indexed_samples import read_indexed
from storage_schemas.runs.ledger import (
    published_versions,
    read_compaction,
    run_names,
    write_ledger,
)
from storage_schemas.sample_plan import read_sample_plan
from storage_schemas.workspace import Workspace

VERSIONS_KEPT = 100  # of what is published


def vacuum(workspace: Workspace, *, older_than: timedelta, dry_run: bool = False) -> list[AnyPath]:
    """Delete what nothing refers to any more; manifests stay, as the ledger counts by them.

    These are: score shards of runs whose rows lie in parts, unless a lake has them, parts that no snapshot and no
    compaction names, the parts that a finished index was merged from, the parts in which tars were read, but for those
    of the newest samples, which are found again when a tar changes, all but the last hundred versions of what is
    published, and unfinished files that processes which died left. Only files that are older than `older_than` are
    deleted: a reader that started before the compaction may still look at the shards.

    The root may be a folder with other things in it. Only names that this package gives are looked at, in the folders
    where it gives them, and nothing behind a link.
    """
    before = datetime.now(UTC) - older_than
    doomed = [path for path in _unreferenced(workspace) if not _behind_link(workspace, path) and _older(path, before)]
    if not dry_run:
        for path in doomed:
            if isinstance(path, Path) and path.is_dir():  # where a process that died had spilled
                shutil.rmtree(path)
                continue
            remove(path)
            if path.parent.parent.name == "ranks" or path.parent == workspace.sample_parts:
                remove(manifest_path(path))
        for run in run_names(workspace):
            write_ledger(workspace, run)
    return doomed


def _unreferenced(workspace: Workspace) -> Iterator[AnyPath]:
    named = set()
    if isinstance(workspace.root, Path):
        yield from leftovers(workspace.root, workspace.FOLDERS)
    for index in matching(workspace.root / "indexes", "*/index.faiss.manifest.json"):
        yield from _ours(workspace.index_parts(index.parent.name), _INDEX_PART)
    yield from _unneeded_sample_parts(workspace)
    # From the lowest number on, as `update_published` relies on.
    yield from (workspace.published(number) for number in published_versions(workspace)[:-VERSIONS_KEPT])
    for path in matching(workspace.root / "snapshots", "*.json"):
        content = json.loads(read_whole(path))
        if isinstance(content, dict) and "snapshot" in content:  # else another program's
            named |= {part["path"] for part in content["parts"]}
    for run in run_names(workspace):
        compaction = read_compaction(workspace, run)
        if compaction is not None:
            named |= {part.path for part in compaction.parts}
            parts_whole = all(_whole(workspace.file(part.path), part.sha256) for part in compaction.parts)
            if parts_whole and not workspace.lake_marker(run).exists():
                yield from _ours(workspace.scores(run), _SHARD)
        yield from (path for path in _ours(workspace.ranks(run), _PART) if workspace.relative(path) not in named)


def _unneeded_sample_parts(workspace: Workspace) -> Iterator[AnyPath]:
    """Yield the parts of samples that neither the newest table came of nor one that is still to be joined."""
    indexed, needed = read_indexed(workspace), set[AnyPath]()
    newest = "" if indexed is None else workspace.file(indexed.samples).parent.name
    for path in matching(workspace.root / "samples", "*/plan.json"):
        key = path.parent.name
        if key == newest or not workspace.samples(key).exists():
            plan = read_sample_plan(workspace, key)
            needed |= {workspace.sample_part(each.key) for each in plan.parts} if plan else set()
    yield from (path for path in _ours(workspace.sample_parts, _SAMPLE_PART) if path not in needed)


_SHARD, _PART = re.compile(r"part-\d{5,}\.parquet"), re.compile(r"part-\d{5,}-[0-9a-f]{16}\.parquet")
_SAMPLE_PART = re.compile(r"[0-9a-f]{16}\.parquet")
_INDEX_PART = re.compile(r"(trained|(part|grown)-\d{5,})\.faiss(\.manifest\.json)?")


def _ours(folder: AnyPath, name: re.Pattern[str]) -> list[AnyPath]:
    return [path for path in matching(folder, "*") if name.fullmatch(path.name)]


def _behind_link(workspace: Workspace, path: AnyPath) -> bool:
    """Return whether the path is a link, or leads through one below the root: then another folder's file is meant."""
    if not isinstance(path, Path):
        return False
    below_root = len(path.relative_to(workspace.root).parts)  # type: ignore[arg-type]  # both are of one kind
    return any(place.is_symlink() for place in (path, *path.parents[: below_root - 1]))


def _whole(path: AnyPath, sha256: str) -> bool:
    return path.exists() and file_sha256(path) == sha256


def _older(path: AnyPath, instant: datetime) -> bool:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC) < instant
    except FileNotFoundError:  # a temporary file that was renamed meanwhile
        return False
