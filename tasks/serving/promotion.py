"""Promotion: a head and an index become those that are served."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas.heads.metrics_history import mean_value
from storage_schemas.heads.records import index_samples
from storage_schemas.publishing.publish import update_published
from storage_schemas.snapshots.published import Published
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.distilling import EvaluationConfig

log = logging.getLogger("fastgda.serving")


@dataclass(frozen=True)
class Evaluation:
    """The result of an index on the test queries; `refused` says why it is not served, and is empty where it is."""

    metrics: Made
    index: Artifact
    tuned: float
    untuned: float
    refused: str


@task(task_run_name="promotion", cache_policy=NO_CACHE)
def promote(
    workspace: Workspace, config: EvaluationConfig, head: Artifact, index: Artifact, metrics: Made
) -> Evaluation:
    """Serve a head, its index and its metrics together, unless they are refused.

    They are refused below the floors of the configuration, and where they are of other training data than what is
    published.
    """
    tuned, untuned = (
        mean_value(metrics.artifact.path, "mAP", space, config.validation_cutoff) for space in ("tuned", "untuned")
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
        refused = _serve(workspace, head, index, metrics.artifact)
    if refused:
        log.info("index %s is not promoted: %s", index.key, refused)
    else:
        log.info("index %s is promoted: %s", index.key, what)
    return Evaluation(metrics, index, tuned, untuned, refused)


def _serve(workspace: Workspace, head: Artifact, index: Artifact, metrics: Artifact) -> str:
    """Serve head, index and metrics beside what is published by now; return why that cannot be, or an empty text."""
    paths = {"head": head.path, "index": index.path, "metrics": metrics.path}
    served = {name: workspace.relative(path) for name, path in paths.items()}
    samples, refused = index_samples(workspace, head.path, index.path), ""

    def change(before: Published | None) -> Published | None:
        nonlocal refused
        if before is None:
            refused = f"{workspace.root} has no published run: `fastgda publish RUN`, then evaluate again"
        elif before.samples != samples:
            refused = (
                f"index {index.key} is of {samples}, what is published of {before.samples}, where a train_id means "
                "another image: `fastgda publish` a run of the index's data, or train and index on what is published"
            )
        else:
            refused = ""
        return before if refused or before is None else before.model_copy(update={**served, "index_samples": samples})

    update_published(workspace, change)
    return refused
