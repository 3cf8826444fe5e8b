"""The attribution pipeline: from tar shards to a served index."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows.curation import curate
from flows.evaluation import evaluate, judge
from flows.indexing import rebuild_index
from flows.names import named
from flows.training import train_rank_head
from tasks.config.pipeline import PipelineConfig
from tasks.context import Stage
from tasks.reporting.report import write_report
from tasks.watching import events
from tasks.watching.trust import Trust, trust_in


@dataclass(frozen=True)
class RunSummary:
    """What a pipeline made.

    stages: in order; trust: what is known of the teacher; refused: why the index is not served, empty where it is.
    """

    run: str
    stages: list[Stage]
    trust: Trust
    refused: str

    @property
    def report(self) -> Stage:
        return self.stages[-1]


@flow(name="attribution pipeline", flow_run_name=named("pipeline"))
def attribution_pipeline(config: PipelineConfig) -> RunSummary:
    """Teach, distil, serve: see the design's first section."""
    with events.followed():
        curation = curate(config)
        checks = judge(config)
        head = train_rank_head(config, curation.ranks.key)
        index = rebuild_index(config, head.key)
        evaluation = evaluate(config, index.key)
    stages = [*curation.stages, *checks, head, index, evaluation.metrics]
    context = curation.plan.inputs.context
    report = write_report(context, curation.run, stages)
    trust = trust_in(context.workspace, curation.run)
    return RunSummary(curation.run, [*stages, report], trust, evaluation.refused)
