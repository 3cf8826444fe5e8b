"""Labels that a rank head learns from: the rank labels of a snapshot, and the samples and queries behind them."""

from __future__ import annotations

from dataclasses import dataclass

from fastgda_core.errors import UsageError
from storage_schemas.runs.ledger import read_run
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.inputs.features import extract_features
from tasks.inputs.queries import queries_artifact
from tasks.inputs.samples import samples_artifact


@dataclass(frozen=True)
class Labels:
    """A snapshot's rank labels.

    run: the last of the snapshot's runs.
    queries: a query set of each run, in the order in which later ones replace earlier ones.
    """

    run: str
    samples: Artifact
    queries: tuple[Artifact, ...]
    ranks: Artifact


def read_labels(workspace: Workspace, snapshot: str | None) -> Labels:
    """Read the labels of a snapshot, by default of the published one.

    Raises:
        NotPublished: there is no such snapshot.
        UsageError: the snapshot holds runs that were imported, whose queries have no images.
    """
    found = read_snapshot(workspace, snapshot or read_published(workspace).snapshot)
    records = [read_run(workspace, run) for run in found.runs]
    for record in records:
        if record.queries is None or record.samples is None:
            raise UsageError(
                f"run {record.run} was imported: it has no images to train on; publish the others without it"
            )
    samples = samples_artifact(workspace.file(records[-1].samples or ""))
    queries = dict.fromkeys(queries_artifact(workspace.file(record.queries or "")) for record in records)
    ranks = Artifact("rank labels", found.snapshot, workspace.snapshot(found.snapshot), found.rows)
    return Labels(found.runs[-1], samples, tuple(queries), ranks)


def extract_query_features(context: Context, labels: Labels) -> None:
    """Extract features of all query sets, in the context's feature space."""
    for queries in labels.queries:
        extract_features(context, queries)
