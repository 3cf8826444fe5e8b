"""Rank labels, and the snapshot that readers see."""

from __future__ import annotations

import time

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas.commit import read_manifest
from storage_schemas.compaction import compact
from storage_schemas.ledger import read_compaction
from storage_schemas.snapshots import (
    make_snapshot,
    publish_runs,
    read_published,
    read_ranks,
    read_snapshot,
    write_published,
)
from tasks.context import Context, Stage
from tasks.progress import stage
from tasks.score_plan import ScoreRun


@task(task_run_name="rank labels", cache_policy=NO_CACHE)
def rank_scores(context: Context, score_run: ScoreRun) -> Stage:
    """Rank labels of every query's candidates, in the large files that readers see once they are published."""
    workspace = context.workspace
    started = time.time()
    with stage("rank labels", score_run.pairs if read_compaction(workspace, score_run.run) is None else 0) as advance:
        compact(workspace, score_run.run, advance=advance)
    snapshot = make_snapshot(workspace, [score_run.run])
    manifests = [manifest for part in snapshot.parts if (manifest := read_manifest(workspace.file(part.path)))]
    reused = all(made.committed_at is not None and made.committed_at.timestamp() < started for made in manifests)
    seconds = sum(manifest.seconds for manifest in manifests)
    path = workspace.snapshot(snapshot.snapshot)
    return Stage("rank labels", snapshot.snapshot, path, snapshot.rows, seconds, reused)


def load_ranks(context: Context, ranks: Stage, query_ids: list[str] | None = None) -> pa.Table:
    """Rows of the rank labels' snapshot, of all its queries or of some."""
    return read_ranks(context.workspace, ranks.key, query_ids)


def run_behind(context: Context, ranks: Stage) -> str:
    """The run that a snapshot's rows are of; the last, where it holds several."""
    return read_snapshot(context.workspace, ranks.key).runs[-1]


def publish_scores(context: Context, score_run: ScoreRun, exact: Stage | None) -> None:
    """Let SQL see the finished scores; what an earlier pass over the same rows published on top of them stays."""
    workspace = context.workspace
    publish_runs(workspace, [score_run.run], exact_check=workspace.relative(exact.path) if exact else None)


def publish_head(context: Context, head: Stage, index: Stage, metrics: Stage) -> None:
    """Serve a head, its index and its metrics, together."""
    workspace = context.workspace
    paths = {
        name: workspace.relative(made.path) for name, made in (("head", head), ("index", index), ("metrics", metrics))
    }
    published = read_published(workspace)
    if published.model_copy(update=paths) != published:
        write_published(workspace, published.model_copy(update=paths))
