"""The attribution pipeline: from tar shards to a served index."""

from __future__ import annotations

from prefect import flow

from fastgda_core.errors import UsageError
from flows.curation import curate
from flows.evaluation import evaluate, judge_run
from flows.indexing import rebuild_index
from flows.names import named
from flows.training import train_rank_head
from tasks.artifact import looked_at_once
from tasks.config.pipeline import PipelineConfig
from tasks.reporting.finished import RunSummary
from tasks.reporting.report import write_report
from tasks.watching import events, openlineage


@flow(name="attribution pipeline", flow_run_name=named("pipeline"))
@openlineage.told("pipeline")
def attribution_pipeline(config: PipelineConfig) -> RunSummary:
    """Teach, distil, serve: see the design's first section.

    Raises:
        UsageError: the configuration publishes nothing, so that nothing can be served.
    """
    if config.publish == "never":
        raise UsageError("publish is never: `fastgda curate CONFIG` scores and publishes nothing; else remove it")
    with events.followed(), looked_at_once():
        curation = curate(config)
        head = train_rank_head(config, curation.ranks.key)
        index = rebuild_index(config, head.artifact.key)
        checks = judge_run(curation.run)  # of the head, too, and what it finds is part of the evaluation
        evaluation = evaluate(config, index.artifact.key)
    made = [*curation.made, head, index, *checks, evaluation.metrics]
    run = curation.run
    report = write_report(run.context, run.name, made)
    return RunSummary(run.name, [*made, report], curation.trust, evaluation.refused)
