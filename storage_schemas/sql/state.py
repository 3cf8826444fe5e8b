"""The content of a workspace at one moment, which SQL shows."""

from __future__ import annotations

from dataclasses import dataclass

from storage_schemas.indexed_samples import Indexed, read_indexed
from storage_schemas.runs.ledger import read_run, run_names
from storage_schemas.runs.records import RunRecord
from storage_schemas.snapshots.published import NotPublished, OtherRelease, Published, read_published
from storage_schemas.snapshots.snapshots import Snapshot, read_snapshot
from storage_schemas.sql.masks import Masks
from storage_schemas.workspace import Workspace


@dataclass(frozen=True)
class State:
    """The content of the workspace at one moment; published and snapshot are None before the first run is published."""

    published: Published | None
    snapshot: Snapshot | None
    indexed: Indexed | None
    runs: dict[str, RunRecord]
    masks: Masks

    @classmethod
    def of(cls, workspace: Workspace) -> State:
        runs = {run: read_run(workspace, run) for run in run_names(workspace)}
        indexed, masks = read_indexed(workspace), Masks(workspace)
        try:
            published = read_published(workspace)
        except NotPublished as error:
            # A first run can be watched while it grows, from its samples on.
            if not (runs or indexed) or isinstance(error, OtherRelease):
                raise
            return cls(None, None, indexed, runs, masks)
        return cls(published, read_snapshot(workspace, published.snapshot), indexed, runs, masks)

    @property
    def samples(self) -> str | None:
        """The published samples with those that were added to the served index, or else those indexed last."""
        if self.published is not None:
            return self.published.index_samples or self.published.samples
        return self.indexed.samples if self.indexed else None

    @property
    def rejected_samples(self) -> list[str]:
        """Tables of what was rejected beside the published samples, and beside those that were indexed last."""
        both = (self.published and self.published.rejected_samples, self.indexed and self.indexed.rejected_samples)
        return list(dict.fromkeys(path for path in both if path))
