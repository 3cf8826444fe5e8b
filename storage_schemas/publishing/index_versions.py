"""The versions of the index: what each is, and why one cannot take the place of what is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from storage_schemas.commit import read_manifest
from storage_schemas.files import AnyPath
from storage_schemas.heads.evaluations import Precision, read_evaluations, read_precision, worse
from storage_schemas.heads.records import indexed_table, read_index_record
from storage_schemas.listings import list_tree
from storage_schemas.snapshots.published import Published
from storage_schemas.sql.masks import Masks
from storage_schemas.workspace import Workspace

INDEX = "index.faiss"
RECALL_LOSS = 0.02  # a recall that is lower by more than this is worse
DEFAULT_CUTOFF = 100  # of mAP, where what is published names none


@dataclass(frozen=True)
class IndexVersion:
    """One index that was built.

    kind: FAISS's name of it; empty where an earlier release built it, whose indexes are exact.
    reason: why it is of this kind; empty of these, too.
    size: bytes of all its files.
    recall_at_10, recall_at_100: against exact search; None where they were not measured.
    precision: mAP of its head on the test queries of a snapshot, by the snapshot.
    served: whether answers come from it.
    stale: whether it holds vectors of samples that were taken down since.
    rollbacks: how many rollbacks lead to it; None where none does.
    """

    version: str
    kind: str
    reason: str
    head: str
    samples: str
    vectors: int
    size: int
    built_at: datetime | None
    recall_at_10: float | None
    recall_at_100: float | None
    precision: dict[str, Precision]
    served: bool
    stale: bool
    rollbacks: int | None

    def precision_on(self, snapshot: str) -> Precision | None:
        """Return the precision on a snapshot, on another where it was not measured there; None: on none."""
        return self.precision.get(snapshot) or next(iter(self.precision.values()), None)


def index_versions(workspace: Workspace, published: Published | None) -> list[IndexVersion]:
    """Return every index that is whole, the one built last first; `published` is what is published."""
    masks = Masks(workspace)
    precisions = _precisions(workspace, published)
    before = [each.index for each in reversed(published.served_before)] if published else []
    found = []
    for name, size in _sizes(workspace).items():
        folder = workspace.index(name)
        manifest = read_manifest(folder / INDEX)
        if manifest is None:  # it is being built, or deleted
            continue
        record, relative = read_index_record(folder), workspace.relative(folder)
        samples = indexed_table(workspace, folder, record)
        served = published is not None and published.index == relative
        head = record.head or (published.head_version if served and published else "")
        of_head = {snapshot: precision for (of, snapshot), precision in precisions.items() if of == head}
        version = IndexVersion(
            version=name,
            kind=record.kind,
            reason=record.reason,
            head=head,
            samples=samples,
            vectors=manifest.rows,
            size=size,
            built_at=manifest.committed_at,
            recall_at_10=record.recall_at_10,
            recall_at_100=record.recall_at_100,
            precision=of_head,
            served=served,
            stale=masks.stale_index(folder, samples),
            rollbacks=before.index(relative) + 1 if relative in before else None,
        )
        found.append(version)
    return sorted(found, key=lambda each: each.built_at.timestamp() if each.built_at else 0.0, reverse=True)


def cutoff_of(published: Published | None) -> int:
    """Return the L of mAP(L) that versions are compared by: that of the published configuration."""
    evaluation = published.config.get("evaluation") if published else None
    cutoff = evaluation.get("validation_cutoff") if isinstance(evaluation, dict) else None
    return cutoff if isinstance(cutoff, int) else DEFAULT_CUTOFF


def _sizes(workspace: Workspace) -> dict[str, int]:
    """Return the bytes of each index's files by its version, from one listing of all."""
    sizes: dict[str, int] = {}
    names = set()
    for path, entry in list_tree(workspace.root / "indexes").items():
        name, _, file = path.partition("/")
        sizes[name] = sizes.get(name, 0) + entry.size
        if file == INDEX:
            names.add(name)
    return {name: sizes[name] for name in sorted(names)}


def folder_size(folder: AnyPath) -> int:
    """Return the bytes of all files below a folder."""
    return sum(entry.size for entry in list_tree(folder).values())


def refusals(
    candidate: IndexVersion, served: IndexVersion | None, cutoff: int, *, measured: bool = False
) -> Iterator[str]:
    """Yield each reason why a version is not to take the place of what is served, compared with that.

    `cutoff` is the L of the mAP(L) that were read; `measured`: the caller has metrics of it.
    """
    if not candidate.precision and not measured:
        yield (
            f"nobody measured how its head {candidate.head} ranks: `fastgda evaluate CONFIG --index "
            f"{candidate.version}` does"
        )
    if served is None or served.version == candidate.version:
        return
    for snapshot in candidate.precision.keys() & served.precision.keys():
        mine, theirs = candidate.precision[snapshot], served.precision[snapshot]
        if worse(mine, theirs):
            yield f"its mAP({cutoff}) is {mine.mean:.3f}, that of {served.version}, which is served, {theirs.mean:.3f}"
    for k in (10, 100):
        recall, theirs_ = _recall(candidate, k), _recall(served, k)
        if recall is None and theirs_ is not None:
            yield f"its recall@{k} was not measured, that of {served.version}, which is served, is {theirs_:.3f}"
        elif recall is not None and theirs_ is not None and recall < theirs_ - RECALL_LOSS:
            yield f"its recall@{k} is {recall:.3f}, that of {served.version}, which is served, {theirs_:.3f}"
    if candidate.stale and not served.stale:
        yield f"it holds images that were taken down, and {served.version}, which is served, does not"


def _recall(version: IndexVersion, k: int) -> float | None:
    if not version.kind:
        return 1.0  # earlier releases built indexes that compare a query with every vector
    return version.recall_at_10 if k == 10 else version.recall_at_100


def _precisions(workspace: Workspace, published: Published | None) -> dict[tuple[str, str], Precision]:
    """Return the mAP of each head on each snapshot that it was measured on."""
    metrics = read_evaluations(workspace)
    if published is not None and published.metrics is not None and published.head is not None:
        # Earlier releases did not note what metrics are of.
        metrics.setdefault((published.head_version, published.snapshot), workspace.file(published.metrics))
    cutoff = cutoff_of(published)
    read = {of: read_precision(path, cutoff) for of, path in metrics.items()}
    return {of: precision for of, precision in read.items() if precision is not None}
