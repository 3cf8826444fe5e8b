"""Find files that were damaged after their commit, move them out of readers' way, and have them made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from storage_schemas.commit import MANIFEST, manifest_path, read_manifest
from storage_schemas.database import file_list, open_database
from storage_schemas.files import AnyPath, file_sha256, matching, move, read_whole
from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.runs.ledger import done_shards, read_labelling, read_run, run_names, write_ledger
from storage_schemas.runs.records import Negatives, Part
from storage_schemas.snapshots.compaction import compact
from storage_schemas.tombstones import UnreadableTombstones, read_tombstones
from storage_schemas.workspace import Workspace


class DamagedFile(ValueError):
    """A committed file is not what its manifest says."""


@dataclass(frozen=True)
class Damage:
    """A damaged committed file: its path, what is wrong with it, and where it was moved."""

    path: str
    reason: str
    moved_to: str


def committed_files(workspace: Workspace) -> list[AnyPath]:
    """Return every file of the workspace that has a manifest, whether or not the file is still there."""
    folders = [workspace.root / name for name in workspace.FOLDERS if name != "quarantine"]
    manifests = [path for folder in folders for path in matching(folder, f"**/*{MANIFEST}")]
    return [path.with_name(path.name.removesuffix(MANIFEST)) for path in manifests]


def verify(workspace: Workspace, *, advance: Callable[[int], None] = lambda files: None) -> list[Damage]:
    """Read every committed file and compare it with its manifest's size and sha256.

    A damaged file is moved to `quarantine/<time>/` with its manifest, so that the stage that made it makes it again. A
    score shard is noted in the ledger as quarantined, and `fastgda retry` scores it again. A damaged part of a run
    whose shards are all there is made again at once, so that readers are without it for seconds only.

    Args:
        advance: called with 1 for each file that was looked at.
    """
    found: list[Damage] = []
    folder = workspace.quarantine(datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f"))
    for path in committed_files(workspace):
        reason = _fault(path)
        if reason is not None:
            found.append(_quarantine(workspace, path, folder, reason))
        advance(1)
    if found:
        for run in run_names(workspace):
            _mend(workspace, run, found)
    return found


def duplicated_pairs(workspace: Workspace, run: str) -> int:
    """Count the (query_id, train_id) that occur more than once in a run's shards: 0, or exactly-once is broken."""
    paths = [path for path in matching(workspace.scores(run), "part-*.parquet") if read_manifest(path)]
    if not paths:
        return 0
    with open_database(workspace, memory_gigabytes=4.0, threads=2) as connection:
        rows = connection.execute(f"""
            SELECT count(*) FROM (
                SELECT 1 FROM read_parquet({file_list(paths)}) GROUP BY query_id, train_id HAVING count(*) > 1
            )
        """).fetchall()
    return int(rows[0][0])


def take_downs_fault(workspace: Workspace) -> str:
    """Return what is wrong with the records of take-downs, empty where nothing is.

    They stay where they are: moved away, they would no longer hide what was taken down.
    """
    try:
        read_tombstones(workspace)
    except UnreadableTombstones as error:
        return str(error)
    return ""


def _fault(path: AnyPath) -> str | None:
    """Return what is wrong with a committed file, None where nothing is.

    A file that is gone is no fault here: the ledger or the file's stage notices.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return "its manifest cannot be read" if manifest_path(path).exists() else None
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    if size != manifest.size:
        return f"it has {size} bytes, its manifest says {manifest.size}"
    digest = file_sha256(path)
    if digest != manifest.sha256 and read_manifest(path) == manifest:  # else it was replaced meanwhile
        return f"its sha256 begins with {digest[:12]}, its manifest says {manifest.sha256[:12]}"
    return None


def _quarantine(workspace: Workspace, path: AnyPath, folder: AnyPath, reason: str) -> Damage:
    relative = workspace.relative(path)
    # The manifest goes first: a file without one is not trusted, so a crash between the two does no harm.
    for old in (manifest_path(path), path):
        move(old, folder / workspace.relative(old))
    return Damage(relative, reason, workspace.relative(folder / relative))


def _mend(workspace: Workspace, run: str, found: list[Damage]) -> None:
    reasons = {damage.path: damage.reason for damage in found}
    log = AttemptLog(workspace, run)
    for shard in range(read_run(workspace, run).shards):
        reason = reasons.get(workspace.relative(workspace.score_shard(run, shard)))
        if reason is not None:
            log.record(shard, ShardState.quarantined, error=DamagedFile(reason))
    parts = workspace.relative(workspace.ranks(run))
    lost_parts = {path for path in reasons if path.startswith(f"{parts}/")}
    if lost_parts and len(done_shards(workspace, run)) == read_run(workspace, run).shards:
        compact(workspace, run)
        # A snapshot may hold parts of a labelling that the run had before.
        for negatives in _labellings(workspace, lost_parts) - {read_labelling(workspace, run).negatives}:
            compact(workspace, run, negatives=negatives)
    write_ledger(workspace, run)


def _labellings(workspace: Workspace, paths: set[str]) -> set[Negatives]:
    """Return the labellings by which these parts were made, where a snapshot names the parts."""
    snapshots = matching(workspace.root / "snapshots", "*.json")
    named = (part for path in snapshots for part in json.loads(read_whole(path))["parts"])
    return {Part.model_validate(part).negatives for part in named if part["path"] in paths}
