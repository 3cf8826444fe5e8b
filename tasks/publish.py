"""Rank labels, the snapshot that readers see, and what is known of the teacher behind it."""

from __future__ import annotations

import json
import time

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas.commit import read_manifest, write_atomically
from storage_schemas.ledger import Labelling, read_compaction, write_labelling
from storage_schemas.snapshots import (
    Published,
    Snapshot,
    make_snapshot,
    publish_runs,
    read_influence,
    read_ranks,
    read_snapshot,
    update_published,
)
from storage_schemas.workspace import Workspace
from tasks.context import Context, Stage
from tasks.progress import stage
from tasks.run_inputs import RunInputs
from tasks.trust import check_paths


@task(task_run_name="rank labels", cache_policy=NO_CACHE)
def rank_scores(inputs: RunInputs) -> Stage:
    """Rank labels of every query of one finished run, whether or not readers see it."""
    started = time.time()
    _label(inputs)
    return _as_stage(inputs.workspace, make_snapshot(inputs.workspace, [inputs.run]), started)


@task(task_run_name="publish", cache_policy=NO_CACHE)
def publish_scores(inputs: RunInputs, *, incomplete: bool) -> Stage:
    """Rank labels of the run, alone or beside those that are published already, made what readers see in one step.

    Args:
        incomplete: publish what there is.
    """
    workspace, started = inputs.workspace, time.time()
    add = inputs.context.config.publish == "add"
    _label(inputs)
    rows = sum(inputs.rows("scores", range(inputs.count("scores"))))
    with stage("rank labels", 0 if _is_ranked(inputs) else rows) as advance:
        published = publish_runs(workspace, [inputs.run], add=add, incomplete=incomplete, advance=advance)
    snapshot = read_snapshot(workspace, published.snapshot)
    return _as_stage(workspace, snapshot, started)


def _label(inputs: RunInputs) -> None:
    """Make the labelling of the configuration the run's own, for all who compact the run from now on."""
    negatives = inputs.context.config.teacher.negatives
    write_labelling(inputs.workspace, inputs.run, Labelling(negatives=negatives))


def _is_ranked(inputs: RunInputs) -> bool:
    """Whether the run has large files, and of the configuration's labelling."""
    compaction = read_compaction(inputs.workspace, inputs.run)
    negatives = inputs.context.config.teacher.negatives
    return compaction is not None and all(part.negatives == negatives for part in compaction.parts)


def _as_stage(workspace: Workspace, snapshot: Snapshot, started: float) -> Stage:
    manifests = [manifest for part in snapshot.parts if (manifest := read_manifest(workspace.file(part.path)))]
    reused = all(made.committed_at is not None and made.committed_at.timestamp() < started for made in manifests)
    seconds = sum(manifest.seconds for manifest in manifests)
    path = workspace.snapshot(snapshot.snapshot)
    return Stage("rank labels", snapshot.snapshot, path, snapshot.rows, seconds, reused)


def load_influence(context: Context, ranks: Stage, query_ids: list[str]) -> pa.Table:
    """Rows of the rank labels' snapshot, of some queries, with the scores that count: negative ones may be 0."""
    return read_influence(context.workspace, ranks.key, query_ids)


def load_ranks(context: Context, ranks: Stage, query_ids: list[str] | None = None) -> pa.Table:
    """Rows of the rank labels' snapshot, of all its queries or of some."""
    return read_ranks(context.workspace, ranks.key, query_ids)


def run_behind(context: Context, ranks: Stage) -> str:
    """The run that a snapshot's rows are of; the last, where it holds several."""
    return read_snapshot(context.workspace, ranks.key).runs[-1]


def publish_checks(inputs: RunInputs, checks: list[Stage]) -> None:
    """Keep what checks of a run's teacher found beside what earlier ones did, and show checked pairs in SQL."""
    workspace = inputs.workspace
    earlier = read_checks(inputs.context, inputs.run)
    named = {check.name: [check.key, workspace.relative(check.path), check.rows] for check in (*earlier, *checks)}
    write_atomically(workspace.checks(inputs.run), json.dumps(named, indent=2).encode() + b"\n")
    exact = named["exact check"][1] if "exact check" in named else None

    def with_check(before: Published | None) -> Published | None:
        return before.model_copy(update={"exact_check": exact}) if before and before.run == inputs.run else before

    update_published(workspace, with_check)


def read_checks(context: Context, run: str) -> list[Stage]:
    """What is known of a run's teacher; nothing before it was judged."""
    found = check_paths(context.workspace, run)
    return [Stage(name, key, path, rows, 0.0, True) for name, (key, path, rows) in found.items()]
