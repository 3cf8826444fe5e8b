"""Checks of a teacher: against twins, the exact teacher, itself drawn again, and float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.evaluation.ranking_metrics import agreement, spearman, twin_ranks
from fastgda_core.evaluation.twins import TwinTest, first_places
from fastgda_core.teachers.registry import UNLEARNING_TEACHERS
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import compress, expand, expected_spread
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, committed, input_key
from storage_schemas.heads.records import EXACT_CHECK
from storage_schemas.runs.noise_plan import NOISE_PLAN
from storage_schemas.snapshots.snapshots import read_influence, read_ranks
from storage_schemas.workspace import part
from tasks.artifact import Artifact, Made, once
from tasks.context import Context
from tasks.inputs.queries import Query, load_queries
from tasks.inputs.twins import load_twins
from tasks.judging.metric_rows import agreement_rows, metric_row, metric_rows, twin_rows
from tasks.progress import stage
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.checkpoints import Asked, AtCheckpoint, at_checkpoints, summed_scores
from tasks.teaching.curvature import curvature_of, make_curvature
from tasks.teaching.families import family_of
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.noise import run_plan
from tasks.teaching.run import Run
from tasks.teaching.unlearning import unlearning_teacher
from tasks.teaching.updates import device_fisher, gradient_of, relative_errors, update_of
from tasks.watching.trust import (
    KINDS,
    OTHER_CURVATURE,
    OTHER_GRADIENT,
    OTHER_NOISE,
    OTHER_TEACHER,
    TEACHER,
    TWIN_RANK,
)

PRECISION_CHECK_SAMPLES = 32
PRECISION_CHECK_QUERIES = 64
PRECISION_AGREEMENT = 0.999  # design section 4, "First order"


@task(task_run_name="precision check", cache_policy=NO_CACHE)
def check_precision(run: Run) -> Made:
    """Score a few pairs in the teacher's precision and in float64; refuse a precision that ranks them otherwise.

    Raises:
        UsageError: their rank correlation is below 0.999.
    """
    context, stages = run.context, run.artifacts
    latents, queries = stages["latents"], stages["queries"]
    precision = context.config.teacher.precision
    numbers = list(range(min(queries.rows, PRECISION_CHECK_QUERIES)))

    def rows() -> list[dict[str, object]]:
        count = min(latents.rows, PRECISION_CHECK_SAMPLES)
        train_ids = np.unique(np.linspace(0, latents.rows - 1, count).astype(int))

        def both(chosen: NDArray[np.int64]) -> Tensor:
            block = load_block(context, latents, chosen.tolist())
            asked = [at.asked(numbers, len(numbers)) for at in at_checkpoints(context, stages)]
            return torch.stack([_scores(run, block, asked, each) for each in (precision, Precision.float64)])

        known, nothing = unreadable_samples(latents, train_ids.tolist()), torch.empty(2, len(numbers), 0)
        _, (coarse, fine), _ = without_bad_samples(train_ids, known, both, nothing)
        correlation = spearman(coarse, fine)
        if correlation.mean() < PRECISION_AGREEMENT:
            raise UsageError(
                f"teacher.precision is {precision}: on this model its scores agree with float64 to a rank correlation "
                f"of {correlation.mean():.4f} only, where {PRECISION_AGREEMENT} is asked: use float32"
            )
        names = [load_queries(queries)[number].query_id for number in numbers]
        return list(metric_rows("spearman", f"{precision} vs float64", correlation, names))

    taught_by = family_of(context.config).key(context, stages)
    key = input_key("precision check", taught_by, precision, table=tables.METRICS)
    return _check(context, "precision check", key, rows)


def _scores(
    run: Run,
    block: SampleBlock,
    asked: list[Asked],
    precision: Precision | None = None,
    seed: int | None = None,
) -> Tensor:
    """Return the configured teacher's scores, (queries, n), on the CPU; under other noise where a seed is given."""
    teacher = unlearning_teacher(run.context.config)
    plan = run_plan(run.context, run.artifacts.get(NOISE_PLAN), seed)
    return summed_scores(teacher, asked, plan, block, precision=precision).values.cpu()


@task(task_run_name="self-consistency", cache_policy=NO_CACHE)
def check_self_consistency(run: Run, ranks: Artifact) -> Made:
    """Score some pairs again: with other noise, another gradient of the query, another curvature, and all three.

    The figures are rank correlation and mAP(L) of the teacher with itself; L is scaled by the share of the candidates
    that is scored again. With all three these are figures of two whole teachers: no student can be expected to agree
    with one of them better.
    """
    context, score_run, stages = run.context, run.score_run, run.artifacts
    latents, queries = stages["latents"], stages["queries"]
    config = context.config.self_consistency
    assert config is not None
    chosen = _test_queries(queries, config.queries)
    several = at_checkpoints(context, stages)
    others = [curvature_of(_with_other_curvature(at.context), latents) for at in several]
    keys = [each.key for at, other in zip(several, others, strict=True) for each in (at.curvature, other)]
    cutoffs = context.config.evaluation.cutoffs
    key = input_key("self-consistency 3", ranks.key, keys, config, cutoffs, table=tables.METRICS)

    def rows() -> list[dict[str, object]]:
        for at in several:
            make_curvature(_with_other_curvature(at.context), latents)
        seed = context.config.teacher.seed
        draw = np.random.default_rng(seed)
        tied = context.config.teacher.negatives == "tie"
        stored = read_influence(context.workspace, ranks.key, [score_run.query_ids[number] for number in chosen])
        groups = [chosen] if unlearning_teacher(context.config).first_order else [[number] for number in chosen]
        comparisons: list[_Comparison] = []
        with stage("self-consistency", len(chosen)) as advance:
            for numbers in groups:
                mine = stored.filter(pc.is_in(stored["query_id"], pa.array([score_run.query_ids[n] for n in numbers])))
                pool = np.unique(mine["train_id"].to_numpy())
                train_ids = np.sort(draw.choice(pool, min(config.samples, len(pool)), replace=False))
                block, query_set = load_block(context, latents, train_ids.tolist()), load_queries(queries)
                asked = [
                    _asked_again(at, other, numbers, [query_set[number] for number in numbers], latents.rows)
                    for at, other in zip(several, others, strict=True)
                ]
                again = _scores(run, block, asked, seed=seed + 1)
                again = again.clamp(min=0) if tied else again
                for number, *scores in zip(numbers, *again.split(len(numbers)), strict=True):
                    comparisons.append(_comparison(score_run.query_ids[number], stored, train_ids, scores))
                advance(len(numbers))
        return _consistency_rows(comparisons, context.config.evaluation.cutoffs)

    return _check(context, "self-consistency", key, rows)


def _with_other_curvature(context: Context) -> Context:
    """Return the context whose Fisher is estimated from other rows."""
    config = context.config
    curvature = config.curvature.model_copy(update={"seed": config.curvature.seed + 1})
    return replace(context, config=config.model_copy(update={"curvature": curvature}))


def _asked_again(at: AtCheckpoint, other: Artifact, numbers: list[int], queries: list[Query], samples: int) -> Asked:
    """Return Delta theta of some queries at a checkpoint four times: as stored, and with what may be other.

    That is other Monte-Carlo pairs, the other curvature, and both.
    """
    context, config = at.context, at.context.config.teacher
    stored = at.asked(numbers, len(numbers))
    found, spreads = list(stored.updates), []
    same, drawn = ([gradient_of(context, query, seed) for query in queries] for seed in (config.seed, config.seed + 1))
    for curvature, gradients in ((at.curvature, drawn), (other, same), (other, drawn)):
        fisher = device_fisher(context, curvature)
        several = [update_of(context, gradient, fisher, samples) for gradient in gradients]
        spreads.append(torch.tensor([expected_spread(fisher, update) for update in several], dtype=torch.float64))
        if config.update_rank is not None:
            several = [expand(compress(update, config.update_rank)[0]) for update in several]
        found.append({name: torch.stack([update[name] for update in several]) for name in several[0]})
    divided = None if stored.spreads is None else torch.cat([stored.spreads, *spreads])
    return replace(stored, updates=found, spreads=divided)


@dataclass(frozen=True)
class _Comparison:
    """One query's scores of a share of its candidates, (n,) each: as stored, and again under other noise.

    noise: only the noise is other; gradient, curvature: this is other, too; whole: all three are other.
    """

    query_id: str
    share: float
    stored: Tensor
    noise: Tensor
    gradient: Tensor
    curvature: Tensor
    whole: Tensor

    def pair(self, space: str) -> tuple[Tensor, Tensor]:
        """Return the two rankings that are compared, (1, n) each."""
        first, second = {
            OTHER_NOISE: (self.stored, self.noise),
            OTHER_GRADIENT: (self.noise, self.gradient),
            OTHER_CURVATURE: (self.noise, self.curvature),
            OTHER_TEACHER: (self.stored, self.whole),
        }[space]
        return first[None], second[None]


def _comparison(query_id: str, stored: pa.Table, train_ids: NDArray[np.int64], scores: Sequence[Tensor]) -> _Comparison:
    """Compare stored and new scores, (n,) each, of those samples of `train_ids`, (n,), that are candidates."""
    mine = stored.filter(pc.equal(stored["query_id"], query_id)).sort_by("train_id")
    candidates = mine["train_id"].to_numpy()
    known = np.isin(train_ids, candidates)
    before = mine["score"].to_numpy()[np.searchsorted(candidates, train_ids[known])]
    mask = torch.from_numpy(known)
    return _Comparison(
        query_id, known.sum() / len(candidates), torch.from_numpy(before), *(again[mask] for again in scores)
    )


def _consistency_rows(comparisons: list[_Comparison], cutoffs: list[int]) -> list[dict[str, object]]:
    names = [comparison.query_id for comparison in comparisons]
    rows: list[dict[str, object]] = []
    for space in (OTHER_NOISE, OTHER_GRADIENT, OTHER_CURVATURE, OTHER_TEACHER):
        measured = [agreement(*comparison.pair(space), cutoffs, comparison.share) for comparison in comparisons]
        rows += agreement_rows(space, measured, names)
    return rows


@task(task_run_name="twin test", cache_policy=NO_CACHE)
def check_twins(run: Run, ranks: Artifact) -> Made:
    """Find where the teacher ranks the samples that it has to rank first; see `fastgda_core.evaluation.twins`."""
    context, queries = run.context, run.artifacts["queries"]
    twins = load_twins(queries.path)

    def rows() -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for kind in KINDS:
            query_ids = [query.query_id for query in load_queries(queries) if query.split == kind]
            scored = read_ranks(context.workspace, ranks.key, query_ids)
            places = {query_id: _twin_place(scored, query_id, twins[query_id]) for query_id in query_ids}
            known = {query_id: place for query_id, place in places.items() if place is not None}
            found += _twin_rows(kind, known) if known else []
        return found

    return _check(context, "twin test", input_key("twin test", ranks.key, queries.key, table=tables.METRICS), rows)


def _twin_place(scored: pa.Table, query_id: str, twin: int) -> tuple[int, int] | None:
    """Return the rank of a query's twin, and how many places count as first; None where the twin was left out."""
    mine = scored.filter(pc.equal(scored["query_id"], query_id))
    place = pc.index(mine["train_id"], twin).as_py()
    if place < 0:
        return None
    scores = torch.from_numpy(mine["score"].to_numpy().copy())[None]
    return int(twin_ranks(scores, torch.tensor([place]))), first_places(mine.num_rows)


def _twin_rows(kind: str, places: dict[str, tuple[int, int]]) -> list[dict[str, object]]:
    test = TwinTest(*zip(*places.values(), strict=True))
    return [
        *twin_rows(test, TEACHER, kind),
        *(
            metric_row(TWIN_RANK, TEACHER, torch.tensor([float(rank)]), cutoff=first, query_id=query_id, split=kind)
            for query_id, (rank, first) in places.items()
        ),
    ]


@task(task_run_name="low-rank error", cache_policy=NO_CACHE)
def measure_low_rank(run: Run) -> Made:
    """Measure what `teacher.update_rank` loses of Delta theta, on average over all queries."""
    context, queries = run.context, run.artifacts["queries"]
    several = at_checkpoints(context, run.artifacts)

    def rows() -> list[dict[str, object]]:
        errors = torch.tensor([relative_errors(at.updates, list(range(queries.rows))) for at in several]).mean(0)
        return [metric_row("relative error", "low-rank Delta theta", errors)]

    taught_by = family_of(context.config).key(context, run.artifacts)
    return _check(context, "low-rank error", input_key("low-rank error", taught_by, table=tables.METRICS), rows)


@task(task_run_name="exact check", cache_policy=NO_CACHE)
def check_against_exact(run: Run, ranks: Artifact) -> Made:
    """Score a few test queries with the exact teacher too, on candidates spread evenly over the first-order ranking."""
    context, score_run, stages = run.context, run.score_run, run.artifacts
    latents, queries = stages["latents"], stages["queries"]
    config = context.config.exact_check
    assert config is not None
    key = input_key("exact check", run.name, config, table=tables.SCORES)
    folder = context.workspace.exact_check(key)
    chosen = _test_queries(queries, config.queries)
    paths = {number: part(folder, number) for number in chosen}
    missing = [number for number in chosen if committed(paths[number], key) is None]
    with stage("exact check", len(missing)) as advance:
        scores = (
            read_ranks(context.workspace, ranks.key, [score_run.query_ids[number] for number in missing])
            if missing
            else None
        )
        plan, teacher = run_plan(context, stages.get(NOISE_PLAN)), UNLEARNING_TEACHERS["abu_plus"]
        for number in missing:
            assert scores is not None
            started = time.monotonic()
            mine = scores.filter(pc.equal(scores["query_id"], score_run.query_ids[number])).sort_by(
                [("score", "descending"), ("train_id", "ascending")]
            )
            take = np.unique(np.linspace(0, mine.num_rows - 1, config.candidates).round().astype(int))
            block = load_block(context, latents, sorted(mine["train_id"].take(take).to_pylist()))
            asked = [at.asked([number], 1) for at in at_checkpoints(context, stages)]
            exact = summed_scores(teacher, asked, plan, block, precision=Precision.float32).values[0]
            names = [score_run.query_ids[number]] * len(exact)
            table = tables.SCORES.rows(
                query_id=names, train_id=block.train_ids.cpu().numpy(), score=exact.cpu().numpy()
            )
            commit_table(paths[number], table, tables.SCORES, key=key, started=started, device=str(context.device))
            advance(1)
    manifests = [made for path in paths.values() if (made := committed(path, key))]
    artifact = Artifact(EXACT_CHECK, key, folder, sum(manifest.rows for manifest in manifests))
    return Made(artifact, sum(manifest.seconds for manifest in manifests), not missing)


def _test_queries(queries: Artifact, count: int | None) -> list[int]:
    return [number for number, query in enumerate(load_queries(queries)) if query.split == "test"][:count]


def _check(context: Context, name: str, key: str, rows: Callable[[], list[dict[str, object]]]) -> Made:
    """Make a check whose outcome is some metrics, committed under its key."""
    path = context.workspace.teacher_check(key)

    def make(started: float) -> Manifest:
        table = pa.Table.from_pylist(rows(), schema=tables.METRICS.schema)
        return commit_table(path, table, tables.METRICS, key=key, started=started, device=str(context.device))

    return once(Artifact(name, key, path, 0), path, make)
