"""The attribution pipeline: from tar shards to a served index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from fastgda_core.diffusion.model import model_hash, train_timesteps
from fastgda_core.teachers.teachers import TEACHERS
from storage_schemas.commit import input_key
from storage_schemas.ledger import kept_ledger
from tasks.candidates import choose_candidates
from tasks.config import PipelineConfig, check_sizes
from tasks.context import Context, Stage
from tasks.curvature import fit_curvature
from tasks.evaluation import evaluate_head
from tasks.features import extract_features
from tasks.head import build_search_index, train_rank_head
from tasks.progress import stage
from tasks.publish import publish_head, publish_scores, rank_scores
from tasks.queries import make_queries
from tasks.report import write_report
from tasks.samples import encode_latents, ingest_samples
from tasks.score_plan import ScoreRun, ScoreShard, plan_scores, store_plan
from tasks.teacher import compute_base_losses, noise_plan, score_shard
from tasks.teacher_checks import check_against_exact, check_precision, check_self_consistency, measure_low_rank
from tasks.unlearning import unlearn_queries

SUBMISSION_WINDOW = 64  # shards in flight: bounds what the coordinator and the server hold at once


class RunIncomplete(RuntimeError):
    """Some score shards failed after their retries; the finished ones are kept."""


@dataclass(frozen=True)
class RunSummary:
    """What a pipeline made: the run's name and, in order, its stages."""

    run: str
    stages: list[Stage] = field(default_factory=list)

    @property
    def report(self) -> Stage:
        return self.stages[-1]


@flow(
    name="attribution pipeline",
    flow_run_name="{config.name} {config.teacher.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]  # one worker with all cores or the GPU
    validate_parameters=False,
)
def attribution_pipeline(config: PipelineConfig) -> RunSummary:
    """Teach, distil, serve: see the design's first section."""
    context = Context(config, model_hash(config.model.folder))
    noise_plan(config).timestep_values(train_timesteps(config.model.folder))  # refused before any work
    samples = ingest_samples(context)
    check_sizes(config, samples.rows)
    queries = make_queries(context)
    features = extract_features(context, samples)
    query_features = extract_features(context, queries)
    latents = encode_latents(context, samples)
    curvature = fit_curvature(context, latents)
    updates = unlearn_queries(context, latents, curvature, queries)
    run = f"{config.name}-{input_key(updates.key, features.key, config.candidates, config.teacher)[:10]}"
    candidates = choose_candidates(context, run, samples, queries)
    score_run = plan_scores(context, candidates, samples, queries)
    checks = []
    if not config.teacher.precision.exact:
        checks.append(check_precision(context, latents, updates, queries))
    if config.teacher.update_rank is not None:
        checks.append(measure_low_rank(context, queries, updates))
    base_losses = None if TEACHERS[config.teacher.name].first_order else compute_base_losses(context, latents)
    store_plan(context, score_run, samples, queries, candidates, base_losses)
    scores = score_shards(context, score_run, latents, updates, base_losses)
    ranks = rank_scores(context, score_run)
    exact = check_against_exact(context, score_run, ranks, latents, queries, updates) if config.exact_check else None
    if config.self_consistency:
        checks.append(check_self_consistency(context, score_run, ranks, latents, curvature, queries, updates))
    publish_scores(context, score_run, exact)
    head = train_rank_head(context, samples, queries, features, ranks)
    index = build_search_index(context, samples, features, head)
    metrics = evaluate_head(context, samples, queries, ranks, head, exact, checks)
    publish_head(context, head, index, metrics)
    stages = [samples, queries, features, query_features, latents, curvature, updates, candidates, base_losses]
    stages += [scores, ranks, exact, *checks, head, index, metrics]
    done = [made for made in stages if made is not None]
    return RunSummary(run, [*done, write_report(context, run, done)])


def score_shards(
    context: Context, score_run: ScoreRun, latents: Stage, updates: Stage, base_losses: Stage | None
) -> Stage:
    """Fan the missing shards out, a bounded window at a time; one shard's failure never stops its neighbours.

    Raises:
        RunIncomplete: names the shards that failed, and why.
    """
    missing = score_run.missing(context.workspace)
    failures: list[str] = []
    pairs = sum(score_run.pairs_of(shard) for shard in missing)
    with kept_ledger(context.workspace, score_run.run) as refresh, stage("teacher scores", pairs) as advance:
        for shard, future in _in_flight(missing, context, score_run, latents, updates, base_losses):
            result = future.result(raise_on_failure=False)
            if isinstance(result, BaseException):
                failures.append(f"shard {shard.name}: {type(result).__name__}: {result}")
            else:
                advance(result)
            refresh()
    if failures:
        raise RunIncomplete(
            f"run {score_run.run}: {len(failures)} of {len(score_run.shards)} score shards failed; "
            f"`fastgda retry {score_run.run}` computes only these\n" + "\n".join(failures)
        )
    return score_run.stage(context.workspace, reused=not missing)


def _in_flight(
    shards: list[ScoreShard], context: Context, score_run: ScoreRun, *inputs: Stage | None
) -> Iterator[tuple[ScoreShard, PrefectFuture[int]]]:
    """Each shard with its future, in order, never more than the window ahead of the reader."""
    waiting = iter(shards)
    window = [
        (shard, score_shard.submit(context, score_run, shard, *inputs)) for shard in islice(waiting, SUBMISSION_WINDOW)
    ]
    while window:
        yield window.pop(0)
        window += [(shard, score_shard.submit(context, score_run, shard, *inputs)) for shard in islice(waiting, 1)]
