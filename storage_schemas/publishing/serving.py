"""Which index answers: promote one, go back to the one before, delete those that nobody can go back to.

Each is one step of what is published, and the snapshot of scores stays what it is. A version that is to be deleted is
named in that step first, and refused from then on: so none is deleted that somebody promotes meanwhile, and a deletion
that was interrupted is completed by the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from storage_schemas.commit import manifest_path
from storage_schemas.errors import StoreError
from storage_schemas.files import is_there, remove, remove_folder
from storage_schemas.heads.evaluations import read_evaluations
from storage_schemas.heads.records import HEAD_FILE, index_samples
from storage_schemas.indexed_samples import continues
from storage_schemas.publishing.index_versions import (
    INDEX,
    IndexVersion,
    cutoff_of,
    folder_size,
    index_versions,
    refusals,
)
from storage_schemas.publishing.publish import update_published, with_served
from storage_schemas.snapshots.published import NotPublished, Published, Served, published_or_none
from storage_schemas.workspace import Workspace


class NotPromoted(StoreError):
    """An index is not to be served, or cannot be."""


class NoWayBack(StoreError):
    """There is nothing to roll back to."""


@dataclass(frozen=True)
class Pruned:
    """An index version that was deleted, and its bytes."""

    version: str
    size: int


def promote_index(workspace: Workspace, version: str, *, force: bool = False, metrics: str | None = None) -> Published:
    """Serve an index and its head in one step, unless it is worse than what is served.

    Args:
        force: also where it is worse; never where it cannot answer beside what is published.
        metrics: of its head, relative to the workspace, to be shown with it; by default those on the published
            snapshot, if there are any.

    Raises:
        NotPromoted: with the reason, in one line.
    """
    relative = workspace.relative(workspace.index(version))

    def change(before: Published | None) -> Published:
        if before is not None and metrics is not None and (before.index, before.metrics) == (relative, metrics):
            return before  # nothing is to be compared, which reads every version
        known = index_versions(workspace, before)
        candidate = _fitting(workspace, before, version, known)
        assert before is not None
        served = next((each for each in known if each.served), None)
        reasons = [] if force else list(refusals(candidate, served, cutoff_of(before), measured=metrics is not None))
        if reasons:
            again = f"`fastgda index promote {version} --force` serves it all the same"
            raise NotPromoted(f"index {version} is refused: {'; '.join(reasons)}: {again}")
        history = before.served_before if before.index == relative else with_served(before)
        update = {
            "index": relative,
            "head": workspace.relative(workspace.head(candidate.head)),
            "index_samples": candidate.samples,
            "metrics": metrics or _metrics_of(workspace, candidate.head, before.snapshot),
            "served_before": history,
        }
        return before.model_copy(update=update)

    published = update_published(workspace, change)
    assert published is not None
    return published


def _fitting(workspace: Workspace, before: Published | None, version: str, known: list[IndexVersion]) -> IndexVersion:
    """Return an index that can answer beside what is published.

    Raises:
        NotPromoted: it cannot.
    """
    if before is None:
        raise NotPromoted(f"{workspace.root} has no published run: `fastgda publish RUN` first")
    if version in before.pruned:
        raise NotPromoted(f"index {version} is being deleted by `fastgda index prune`")
    found = next((each for each in known if each.version == version), None)
    if found is None:
        there = ", ".join(each.version for each in known[:5]) or "none"
        raise NotPromoted(f"there is no index {version!r:.100}; built last: {there}")
    head = workspace.head(found.head)
    if not found.head or not is_there(head / HEAD_FILE):
        raise NotPromoted(
            f"head {found.head or 'of an earlier release'}, which index {version} answers through, is gone"
        )
    samples = found.samples or index_samples(workspace, head, workspace.index(version))
    if before.samples is None or not continues(workspace.file(samples), workspace.file(before.samples)):
        raise NotPromoted(
            f"index {version} is of {samples}, what is published of {before.samples}, where a train_id means another "
            "image: `fastgda publish` a run of the index's data, or train and index on what is published"
        )
    return replace(found, samples=samples)


def _metrics_of(workspace: Workspace, head: str, snapshot: str) -> str | None:
    found = read_evaluations(workspace).get((head, snapshot))
    return None if found is None else workspace.relative(found)


def rollback_index(workspace: Workspace) -> tuple[Published, str | None]:
    """Serve what was served before, in one step; again, what was served before that.

    Returns:
        What is published now, and the version that was served until now; None where none was.

    Raises:
        NoWayBack: nothing was served before that can answer beside what is published.
    """
    left: str | None = None

    def change(before: Published | None) -> Published:
        nonlocal left
        if before is None:
            raise NoWayBack(f"{workspace.root} has no published run")
        for place in reversed(range(len(before.served_before))):
            back = before.served_before[place]
            if back.index != before.index and _can_answer(workspace, before, back):
                left = before.index_version or None
                kept = back.metrics if back.snapshot == before.snapshot else None
                update = {
                    "index": back.index,
                    "head": back.head,
                    "index_samples": back.index_samples,
                    "metrics": kept or _metrics_of(workspace, back.head_version, before.snapshot),
                    "served_before": before.served_before[:place],
                }
                return before.model_copy(update=update)
        raise NoWayBack("nothing was served before that can answer beside what is published: `fastgda index list`")

    published = update_published(workspace, change)
    assert published is not None
    return published, left


def _can_answer(workspace: Workspace, published: Published, back: Served) -> bool:
    there = is_there(manifest_path(workspace.file(back.index) / INDEX)) and is_there(
        workspace.file(back.head) / HEAD_FILE
    )
    if not there or published.samples is None or back.index_version in published.pruned:
        return False
    return continues(workspace.file(back.index_samples), workspace.file(published.samples))


def prune_indexes(workspace: Workspace, keep: int, *, dry_run: bool = False) -> list[Pruned]:
    """Delete index versions; what an earlier call left half deleted goes, too.

    What is served stays, the `keep` versions that rollbacks would lead to one after the other, and whatever was built
    after what is served, as it may be promoted next.

    Raises:
        NotPublished: nothing is served, so that nobody knows what is still wanted.
    """
    doomed: list[Pruned] = []

    def change(before: Published | None) -> Published:
        nonlocal doomed
        if before is None or before.index is None:
            raise NotPublished("no index is served: `fastgda index promote VERSION` first")
        back = list(dict.fromkeys(each.index for each in reversed(before.served_before) if each.index != before.index))
        kept = {before.index, *back[:keep]}
        known = index_versions(workspace, before)
        served_at = next((each.built_at for each in known if each.served), None)
        gone = [
            each.version
            for each in known
            if workspace.relative(workspace.index(each.version)) not in kept
            and not (served_at is not None and each.built_at is not None and each.built_at > served_at)
        ]
        gone += [version for version in before.pruned if version not in gone]
        sizes = {each.version: each.size for each in known}
        doomed = [
            Pruned(version, sizes[version] if version in sizes else folder_size(workspace.index(version)))
            for version in gone
        ]
        if dry_run:
            return before
        history = [each for each in before.served_before if each.index in kept]
        return before.model_copy(update={"served_before": history, "pruned": gone})

    update_published(workspace, change)
    if not dry_run:
        finish_pruning(workspace)
    return doomed


def finish_pruning(workspace: Workspace) -> None:
    """Delete the index versions that a call of `prune_indexes` named and may not have come to delete."""
    published = published_or_none(workspace)
    if published is None or not published.pruned:
        return
    for version in published.pruned:
        folder = workspace.index(version)
        remove(manifest_path(folder / INDEX))  # first: what is half deleted is no index
        remove_folder(folder)
    gone = set(published.pruned)

    def change(before: Published | None) -> Published | None:
        return before and before.model_copy(update={"pruned": [each for each in before.pruned if each not in gone]})

    update_published(workspace, change)
