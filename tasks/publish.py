"""Rank labels, and the snapshot that readers see."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas.catalog import NotPublished, Published, ShardRecord, publish, read_published, write_ranks
from storage_schemas.commit import commit, committed, input_key
from storage_schemas.workspace import part
from tasks.context import Context, Stage
from tasks.score_plan import ScoreRun


@task(task_run_name="rank labels", cache_policy=NO_CACHE)
def rank_scores(context: Context, score_run: ScoreRun) -> Stage:
    """Rank labels of every query's candidates, once per finished run."""
    scores = context.workspace.scores(score_run.run)
    path = context.workspace.ranks(score_run.run)
    key = input_key("ranks", score_run.run)
    manifest = committed(path, key)
    reused = manifest is not None
    if manifest is None:
        started = time.monotonic()
        rows = sum(pq.read_metadata(part(scores, shard.number)).num_rows for shard in score_run.shards)
        if rows != score_run.pairs:
            raise RuntimeError(f"run {score_run.run} has {rows} score rows, its plan {score_run.pairs}")
        manifest = commit(path, lambda temporary: write_ranks(scores, temporary), key=key, rows=rows, started=started)
    return Stage("rank labels", key, path, manifest.rows, manifest.seconds, reused)


def publish_scores(
    context: Context,
    score_run: ScoreRun,
    samples: Stage,
    queries: Stage,
    candidates: Stage,
    ranks: Stage,
    exact: Stage | None,
) -> None:
    """Let SQL see the finished scores; what an earlier pass over this run published on top of them stays."""
    workspace = context.workspace

    def relative(path: Path) -> str:
        return str(path.relative_to(workspace.root))

    try:
        before = read_published(workspace)
    except NotPublished:
        before = None
    kept = before if before is not None and before.run == score_run.run else None
    published = Published(
        run=score_run.run,
        teacher=context.config.teacher.name,
        created_at=kept.created_at if kept else datetime.now(UTC),
        samples=relative(samples.path),
        rejected_samples=relative(samples.path.with_name("rejected.parquet")),
        queries=relative(queries.path),
        candidates=relative(candidates.path),
        scores=relative(workspace.scores(score_run.run)),
        ranks=relative(ranks.path),
        exact_check=relative(exact.path) if exact else None,
        shards=shard_records(context, score_run),
        head=kept.head if kept else None,
        index=kept.index if kept else None,
        metrics=kept.metrics if kept else None,
        config=context.config.model_dump(mode="json"),
    )
    publish(workspace, published)


def shard_records(context: Context, score_run: ScoreRun) -> list[ShardRecord]:
    folder = context.workspace.scores(score_run.run)
    return [
        ShardRecord(
            shard=shard.number,
            path=str(part(folder, shard.number).relative_to(context.workspace.root)),
            pairs=score_run.pairs_of(shard),
        )
        for shard in score_run.shards
    ]


def publish_head(context: Context, head: Stage, index: Stage, metrics: Stage) -> None:
    """Serve a head, its index and its metrics, together."""
    workspace = context.workspace
    paths = {
        name: str(stage.path.relative_to(workspace.root))
        for name, stage in (("head", head), ("index", index), ("metrics", metrics))
    }
    publish(workspace, read_published(workspace).model_copy(update=paths))
