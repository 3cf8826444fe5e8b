"""Curation: plan, make part by part, and publish the teacher's scores of queries and training samples."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from prefect import flow

from flows.names import named
from storage_schemas.runs.liveness import is_preparation
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig, check_sizes
from tasks.config.stored import config_of
from tasks.context import open_context
from tasks.distilling.publish import publish_scores, rank_scores
from tasks.execution.coordinator import begin_run
from tasks.execution.outcomes import RunCancelled
from tasks.execution.partitions import (
    PartitionOutcome,
    all_curated,
    failed_partition,
    in_partition,
    partition_names,
    scheduled_partition,
)
from tasks.execution.plan import planned_run, run_artifacts, run_name
from tasks.execution.preparing import make_all, make_features, make_samples, stored_preparation
from tasks.execution.retry import release
from tasks.execution.rivals import check_rivals
from tasks.inputs.candidates import candidate_features, candidate_space, check_neighbours, choose_candidates
from tasks.inputs.features import extract_features
from tasks.inputs.queries import make_queries
from tasks.judging.dense import check_judged
from tasks.judging.kept_checks import publish_checks
from tasks.judging.teacher import check_precision, check_twins
from tasks.reporting.announcements import announce_scores, announce_trust
from tasks.teaching.families import family_of
from tasks.teaching.run import Run
from tasks.watching import openlineage
from tasks.watching.trust import Trust, trust_in


@dataclass(frozen=True)
class Curation:
    """The result of a curation: its run, everything made in order, and the rank labels as they were published."""

    run: Run
    made: list[Made]
    ranks: Artifact

    @property
    def trust(self) -> Trust:
        """The results of the checks of the run's teacher."""
        return trust_in(self.run.workspace, self.run.name)


def plan_run(config: PipelineConfig) -> Run:
    """Make samples, queries, features and candidates, and plan the run from them."""
    context = open_context(config)
    family_of(config).check(context)
    made_samples = make_samples(context)
    samples = made_samples.artifact
    openlineage.uses(context, samples)
    check_sizes(config, samples.rows)
    check_rivals(config, samples.rows)
    check_neighbours(config.candidates, samples.rows)
    made_queries = make_queries(context, samples)
    queries = made_queries.artifact
    check_judged(config, samples.rows, queries.rows)
    # What does not fit an index is refused before the features of all samples are made.
    by_index = config.candidates.index is not None
    near = candidate_features(context, samples, queries) if by_index else []
    features = [
        make_features(context, samples, [] if by_index else [candidate_space(context)]),
        extract_features(context, queries),
        *(near if by_index else candidate_features(context, samples, queries)),
    ]
    artifacts = run_artifacts(context, samples, queries)
    made_candidates = choose_candidates(context, run_name(context, artifacts), samples, queries)
    check_sizes(config, samples.rows, made_candidates.artifact.rows // queries.rows)
    planned = [made_samples, made_queries, *features, made_candidates]
    return planned_run(context, artifacts, made_candidates.artifact, planned)


@flow(name="curate", flow_run_name=named("curate"))
@openlineage.told("curate")
def curate(config: PipelineConfig) -> Curation:
    """Plan a run, make its parts up to the score shards, and publish them; what is there already is reused.

    With `publish: never`, as of a rival, readers see nothing of it.

    Raises:
        RunIncomplete: parts failed for good; nothing is published unless `execution.publish_incomplete` says so.
        RunCancelled: somebody asked for it.
    """
    run = plan_run(config)
    openlineage.uses(run.context, *(made.artifact for made in run.planned))
    with begin_run(run) as coordinator:
        made = [*run.planned, *map(coordinator.make, coordinator.before("scores"))]
        if not config.teacher.precision.exact:
            made.append(check_precision(run))
        partly = config.execution.publish_incomplete and config.publish != "never"
        make = coordinator.make_unless_incomplete if partly else coordinator.make
        scores = make("scores")
        after = list(map(make, coordinator.after("scores")))
    if config.publish == "never":
        labels = rank_scores(run)
        return Curation(run, [*made, *filter(None, [scores, *after]), labels], labels.artifact)
    ranks = publish_scores(run, incomplete=scores is None)
    announce_scores(run, ranks.artifact.key)
    checks = [check_twins(run, ranks.artifact)] if config.queries.twins else []
    publish_checks(run, [check.artifact for check in checks])
    announce_trust(run)
    return Curation(run, [*made, *filter(None, [scores, *after]), ranks, *checks], ranks.artifact)


@flow(name="curate partition", flow_run_name=named("curate", "partition"))
def curate_partition(config: PipelineConfig, partition: str | None = None, days_back: int = 1) -> Curation:
    """Curate the queries of one partition, by default those of the day before the scheduled start."""
    return curate(in_partition(config, partition or scheduled_partition(days_back)))


@flow(name="backfill", flow_run_name=named("backfill"))
def backfill(
    config: PipelineConfig, first: date | None = None, last: date | None = None, partitions: list[str] | None = None
) -> list[PartitionOutcome]:
    """Curate several partitions: a range of dates, or those named. One that fails does not stop the others."""
    outcomes: list[PartitionOutcome] = []
    for partition in partition_names(first, last, partitions):
        try:
            curation = curate(in_partition(config, partition))
            outcomes.append(PartitionOutcome(partition, curation.run.name))
        except RunCancelled:
            raise
        except Exception as error:  # its flow run has the traceback; the next partition has its own data
            outcomes.append(failed_partition(partition, error))
    return all_curated(outcomes)


@flow(name="prepare", flow_run_name="prepare {run}")
def prepare(config: PipelineConfig, run: str) -> None:
    """Make what the reading of tars, or the encoding of samples, lacks: parts that failed or were never reached."""
    release(config.workspace, run)
    make_all(stored_preparation(config, run))


@flow(name="retry", flow_run_name="retry {run}")
def retry(workspace: str, run: str, shards: str | None = None) -> Curation | None:
    """Make what a run lacks: shards that failed or were quarantined, all or some (`0-2,5`), and samples left out.

    Of work that is done before a run is planned, the parts that it lacks; then there is no curation to return.
    """
    config = config_of(workspace, run)
    if is_preparation(Workspace.at(workspace), run):
        prepare(config, run)
        return None
    release(workspace, run, shards)
    return curate(config)
