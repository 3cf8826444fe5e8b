"""Whole runs in a second or two, from tars to an index that is measured, for tests that look at what came of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.curation import Curation, curate
from flows.evaluation import evaluate, judge_run
from flows.indexing import rebuild_index
from flows.training import train_rank_head
from storage_schemas.workspace import Workspace
from tasks.artifact import Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.serving.promotion import Evaluation
from tasks.teaching.run import Run
from tests import tiny
from tests.tasks.configs import document
from tests.tasks.without_prefect import without_prefect

SAMPLES, TWINS, CUTOFFS = 24, 2, [2, 4]
AXES = 5  # of a gradient head


@dataclass(frozen=True)
class WholeRun:
    """A run with its checks, head, index and evaluation."""

    config: PipelineConfig
    curation: Curation
    checks: list[Made]
    head: Made
    index: Made
    evaluation: Evaluation

    @property
    def run(self) -> Run:
        return self.curation.run

    @property
    def context(self) -> Context:
        return self.run.context

    @property
    def workspace(self) -> Workspace:
        return self.context.workspace


def configuration(folder: Path, model: Path, **changes: object) -> PipelineConfig:
    """Eight images that are samples, too, as queries, and the twins of two samples; features are the pixels."""
    tiny.write_tar(folder / "shapes.tar", tiny.sample_members(range(SAMPLES)))
    tiny.write_tar(folder / "queries.tar", tiny.sample_members(range(8)))
    whole = document(
        workspace=str(folder / "workspace"),
        data__shards=str(folder / "shapes.tar"),
        model__folder=str(model),
        queries={
            "shards": str(folder / "queries.tar"),
            "split": {"train": 4, "validation": 2, "test": 2},
            "twins": TWINS,
            "steps": 2,
        },
        head={"epochs": 2},
        evaluation={"cutoffs": CUTOFFS, "validation_cutoff": CUTOFFS[-1], "neighbors": 3, "gain_floor": None},
        **({"features": {"space": "pixel"}} | changes),
    )
    return PipelineConfig.model_validate(whole)


def whole_run(config: PipelineConfig) -> WholeRun:
    with without_prefect():
        curation = curate(config)
        head = train_rank_head(config, curation.ranks.key)
        index = rebuild_index(config, head.artifact.key)
        checks = judge_run(curation.run)
        return WholeRun(config, curation, checks, head, index, evaluate(config, index.artifact.key))
