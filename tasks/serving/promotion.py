"""Promotion: a head and an index become those that are served."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas.heads.metrics_history import mean_value
from storage_schemas.publishing.serving import NotPromoted, promote_index
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
def promote(workspace: Workspace, config: EvaluationConfig, index: Artifact, metrics: Made) -> Evaluation:
    """Serve an index, its head and its metrics together, unless they are refused.

    They are refused below the floors of the configuration, where they are of other training data than what is
    published, and where they are worse than what is served.
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
        refused = _serve(workspace, index, metrics.artifact)
    if refused:
        log.info("index %s is not promoted: %s", index.key, refused)
    else:
        log.info("index %s is promoted: %s", index.key, what)
    return Evaluation(metrics, index, tuned, untuned, refused)


def _serve(workspace: Workspace, index: Artifact, metrics: Artifact) -> str:
    """Serve an index beside what is published by now; return why that cannot be, or an empty text."""
    try:
        promote_index(workspace, index.key, metrics=workspace.relative(metrics.path))
    except NotPromoted as error:
        return str(error)
    return ""
