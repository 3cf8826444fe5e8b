"""Make rank labels, and publish the snapshot that readers see."""

from __future__ import annotations

import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas.commit import read_manifest
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.ledger import read_compaction, write_labelling
from storage_schemas.runs.records import Labelling
from storage_schemas.snapshots.snapshots import Snapshot, make_snapshot, read_snapshot
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.progress import stage
from tasks.teaching.run import Run


@task(task_run_name="rank labels", cache_policy=NO_CACHE)
def rank_scores(run: Run) -> Made:
    """Make rank labels of every query of one finished run, whether or not readers see the run."""
    started = time.time()
    _label(run)
    return _made(run.workspace, make_snapshot(run.workspace, [run.name]), started)


@task(task_run_name="publish", cache_policy=NO_CACHE)
def publish_scores(run: Run, *, incomplete: bool) -> Made:
    """Publish the run's rank labels in one step, alone or beside those that are published already.

    Args:
        incomplete: publish what there is.
    """
    workspace, started = run.workspace, time.time()
    add = run.config.publish == "add"
    _label(run)
    rows = sum(map(run.scores.rows, range(run.scores.count)))
    with stage("rank labels", 0 if _is_ranked(run) else rows) as advance:
        published = publish_runs(workspace, [run.name], add=add, incomplete=incomplete, advance=advance)
    snapshot = read_snapshot(workspace, published.snapshot)
    return _made(workspace, snapshot, started)


def _label(run: Run) -> None:
    """Make the configuration's labelling the run's own, for all who compact the run from now on."""
    negatives = run.config.teacher.negatives
    write_labelling(run.workspace, run.name, Labelling(negatives=negatives))


def _is_ranked(run: Run) -> bool:
    """Return whether the run has large files of the configuration's labelling."""
    compaction = read_compaction(run.workspace, run.name)
    negatives = run.config.teacher.negatives
    return compaction is not None and all(part.negatives == negatives for part in compaction.parts)


def _made(workspace: Workspace, snapshot: Snapshot, started: float) -> Made:
    manifests = [manifest for part in snapshot.parts if (manifest := read_manifest(workspace.file(part.path)))]
    reused = all(made.committed_at is not None and made.committed_at.timestamp() < started for made in manifests)
    seconds = sum(manifest.seconds for manifest in manifests)
    path = workspace.snapshot(snapshot.snapshot)
    return Made(Artifact("rank labels", snapshot.snapshot, path, snapshot.rows), seconds, reused)
