"""Evaluation: the head against its teacher, the teacher against its checks, and what is served."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from fastgda_core.teachers.registry import TEACHERS
from flows.curation import plan_run
from flows.names import named
from flows.rivals import score_rivals
from tasks.artifact import Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import open_context
from tasks.distilling.calibration import calibrate
from tasks.distilling.labels import extract_query_features, read_labels
from tasks.distilling.publish import rank_scores
from tasks.distilling.versions import latest_index, read_head, read_index, space_of_head
from tasks.execution.coordinator import begin_run
from tasks.execution.preparing import make_features
from tasks.judging.candidates import check_candidates
from tasks.judging.costs import measure_costs
from tasks.judging.head import measure_head
from tasks.judging.kept_checks import publish_checks, read_checks
from tasks.judging.left_out import plan_removals
from tasks.judging.planted import check_planted, planted_samples
from tasks.judging.retrained import check_by_retraining
from tasks.judging.rivals import Rivals
from tasks.judging.sketches import check_sketches
from tasks.judging.tail_patch import check_tail_patch
from tasks.judging.teacher import check_against_exact, check_self_consistency, measure_low_rank
from tasks.reporting.announcements import announce_judges, announce_metrics, announce_trust
from tasks.reporting.judged import write_judge_table
from tasks.serving.promotion import Evaluation, promote
from tasks.teaching.retrainings import RemovalParts, RetrainingParts
from tasks.teaching.run import Run
from tasks.watching import openlineage


@dataclass(frozen=True)
class Judgement:
    """The checks of a run, and what they needed, in order.

    failed: names of rivals that have no scores.
    """

    run: str
    made: list[Made]
    failed: list[str]


@flow(name="judge", flow_run_name=named("judge"))
@openlineage.told("judge")
def judge(config: PipelineConfig) -> Judgement:
    """Check the teacher of a finished run: against the exact one, itself, and models trained again for it."""
    run = plan_run(config)
    made = judge_run(run)
    return Judgement(run.name, made, list(Rivals.of(run).failed))


def judge_run(run: Run) -> list[Made]:
    """Check the teacher of a run that is planned already, as `judge` does."""
    config, ranks = run.config, rank_scores(run).artifact
    checks = []
    if config.teacher.update_rank is not None:
        checks.append(measure_low_rank(run))
    if config.exact_check is not None:
        checks.append(check_against_exact(run, ranks))
    if config.self_consistency is not None and TEACHERS[config.teacher.name].redrawn:
        checks.append(check_self_consistency(run, ranks))
    if config.candidates.check is not None:
        checks.append(check_candidates(run, ranks))
    if config.sketches is not None:
        checks.append(check_sketches(run, ranks))
    if config.tail_patch is not None:
        checks.append(check_tail_patch(run, ranks))
    retrained = []
    if config.judge is not None:
        retrained += score_rivals(run)
        if config.judge.leave_out is not None:
            plan_removals(run, ranks)
        with begin_run(run) as coordinator:
            retrained.append(coordinator.make(RetrainingParts.kind))
            if config.judge.leave_out is not None:
                retrained.append(coordinator.make(RemovalParts.kind))
        checks += [check_by_retraining(run, ranks), measure_costs(run, ranks)]
    if planted := planted_samples(run):
        checks.append(check_planted(run, ranks, planted))
    publish_checks(run, [check.artifact for check in checks])
    announce_trust(run)
    if config.judge is None:
        return checks
    table = write_judge_table(run)
    announce_judges(run)
    return [*retrained, *checks, table]


@flow(name="evaluate", flow_run_name=named("evaluate", "index"))
@openlineage.told("evaluate")
def evaluate(config: PipelineConfig, index: str | None = None) -> Evaluation:
    """Measure an index, by default the newest, on the test queries; past the floors it is promoted, and served."""
    context = open_context(config, model=False)
    built, index_record = read_index(context.workspace, index or latest_index(context.workspace))
    trained, record = read_head(context.workspace, index_record.head)
    context = space_of_head(context, record)
    labels = read_labels(context.workspace, record.snapshot)
    make_features(context, labels.samples)
    extract_query_features(context, labels)
    openlineage.uses(context, labels.ranks, trained, built)
    checks = read_checks(context.workspace, labels.run)
    metrics = measure_head(context, labels.samples, labels.queries, labels.ranks, trained, checks)
    calibrate(context, labels.samples, labels.queries, labels.ranks, trained, metrics.artifact)
    evaluation = promote(context.workspace, config.evaluation, built, metrics)
    announce_metrics(context, evaluation, trained, labels)
    return evaluation
