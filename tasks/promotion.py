"""Which head and index are served."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas.metrics_history import mean_value
from storage_schemas.snapshots import read_published, write_published
from tasks.context import Context, Stage


@dataclass(frozen=True)
class Evaluation:
    """How an index did on the test queries; `refused` says why it is not served, and is empty where it is."""

    metrics: Stage
    index: Stage
    tuned: float
    untuned: float
    refused: str


@task(task_run_name="promotion", cache_policy=NO_CACHE)
def promote(context: Context, head: Stage, index: Stage, metrics: Stage) -> Evaluation:
    """Serve a head, its index and its metrics, together, unless it is below the floors of the configuration."""
    config, workspace = context.config.evaluation, context.workspace
    tuned, untuned = (
        mean_value(metrics.path, "mAP", space, config.validation_cutoff) for space in ("tuned", "untuned")
    )
    assert tuned is not None and untuned is not None
    what = f"mAP({config.validation_cutoff}) of index {index.key} is {tuned:.3f}"
    refused = ""
    if config.floor is not None and tuned < config.floor:
        refused = f"{what}, below evaluation.floor {config.floor}"
    elif config.gain_floor is not None and tuned < config.gain_floor * untuned:
        refused = (
            f"{what}, {tuned / untuned:.2f} x the untuned features', below evaluation.gain_floor {config.gain_floor}"
        )
    if not refused:
        paths = {"head": head.path, "index": index.path, "metrics": metrics.path}
        published = read_published(workspace)
        served = published.model_copy(update={name: workspace.relative(path) for name, path in paths.items()})
        if served != published:
            write_published(workspace, served)
    return Evaluation(metrics, index, tuned, untuned, refused)
