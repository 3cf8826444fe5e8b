"""What the models of a judge take."""

from __future__ import annotations

import json
import statistics

from storage_schemas.files import matching, read_if_there
from storage_schemas.listings import folder_manifests
from storage_schemas.workspace import Workspace
from tasks.config.judging import JudgeConfig, RetrainConfig
from tasks.config.pipeline import PipelineConfig
from tasks.teaching.cost import KindCost, Size
from tasks.teaching.pool import pool_of
from tasks.teaching.retrainings import RemovalParts, RetrainingParts

TRAINING_FORWARDS = 3.0  # one forward and backward to all weights, in forwards
GUIDED_FORWARDS = 2  # of a sampler's step: with the caption and without


def retraining_costs(config: PipelineConfig, size: Size, workspace: Workspace) -> list[KindCost]:
    """Return what a judge's models take, in forward passes; of removals, where no two methods name the same.

    The time of a command of the user's own is that of models that it made in this workspace, else unknown.
    """
    judge = config.judge
    if judge is None:
        return []
    measured = unknown = None
    each, asked = 0.0, size.queries * judge.draws
    if isinstance(judge.retrain, RetrainConfig):
        each = judge.retrain.steps * judge.retrain.batch_size * TRAINING_FORWARDS
    else:
        measured = _measured_seconds(workspace, judge)
        unknown = measured is None
    pool = pool_of(judge)
    counts = {RetrainingParts.kind: (len(pool), sum(each.draws_again for each in pool))}
    if judge.leave_out is not None:
        counts[RemovalParts.kind] = (judge.leave_out.models,) * 2
    pictures = _test_queries(config) * config.queries.steps * GUIDED_FORWARDS if judge.regenerate else 0
    return [
        KindCost(
            kind,
            models,
            models * asked,
            models * (each + asked) + drawing * pictures,
            measured=measured,
            unknown=bool(unknown),
        )
        for kind, (models, drawing) in counts.items()
    ]


def _test_queries(config: PipelineConfig) -> int:
    """Count the queries whose pictures are generated again, each from a caption of the configuration."""
    return config.queries.split.of(len(config.queries.captions or [])).test


def _measured_seconds(workspace: Workspace, config: JudgeConfig) -> float | None:
    """Return the median seconds of the models that were made here by the same recipe; None where there is none."""
    wanted, found = config.recipe["retrain"], []
    for path in matching(workspace.root / "retrainings", "*/recipe.json"):
        content = read_if_there(path)
        if content is not None and json.loads(content)["retrain"] == wanted:
            found += [manifest.seconds for manifest in folder_manifests(path.parent).values()]
    return statistics.median(found) if found else None
