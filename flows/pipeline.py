"""The attribution pipeline: from tar shards to a served index."""

from __future__ import annotations

from prefect import flow

from flows.curation import curate
from flows.evaluation import evaluate, judge_run
from flows.indexing import rebuild_index
from flows.names import named
from flows.training import train_rank_head
from tasks.artifact import looked_at_once
from tasks.config.pipeline import PipelineConfig
from tasks.reporting.finished import RunSummary
from tasks.reporting.report import write_report
from tasks.watching import events
from tasks.watching.trust import trust_in


@flow(name="attribution pipeline", flow_run_name=named("pipeline"))
def attribution_pipeline(config: PipelineConfig) -> RunSummary:
    """Teach, distil, serve: see the design's first section."""
    with events.followed(), looked_at_once():
        curation = curate(config)
        checks = judge_run(curation.plan.inputs)
        head = train_rank_head(config, curation.ranks.key)
        index = rebuild_index(config, head.artifact.key)
        evaluation = evaluate(config, index.artifact.key)
    made = [*curation.made, *checks, head, index, evaluation.metrics]
    context = curation.plan.inputs.context
    report = write_report(context, curation.run, made)
    trust = trust_in(context.workspace, curation.run)
    return RunSummary(curation.run, [*made, report], trust, evaluation.refused)
