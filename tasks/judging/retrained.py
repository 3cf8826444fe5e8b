"""Hold the teacher and its rivals against models that were trained again: the linear datamodelling score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.evaluation.lds import Lds, inclusion_effects, linear_datamodelling, reliability
from fastgda_core.evaluation.ranking_metrics import twin_ranks
from fastgda_core.evaluation.twins import TwinTest, first_places
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from storage_schemas.tables import PSEUDO, TWIN
from tasks.artifact import Artifact, Made, once
from tasks.inputs.features import features_key
from tasks.inputs.queries import Query, load_queries
from tasks.inputs.twins import load_twins
from tasks.judging.ensembles import ensemble_scores
from tasks.judging.leave_k_out import leave_k_out_rows
from tasks.judging.left_out import leave_out_rows
from tasks.judging.methods import every_method
from tasks.judging.metric_rows import metric_row, metric_rows, twin_rows
from tasks.judging.regenerated import regeneration_distances
from tasks.judging.removals import Removals
from tasks.judging.retrained_pool import RetrainedPool
from tasks.judging.rivals import Rivals
from tasks.judging.tiers import Tiers
from tasks.teaching.retrainings import RemovalParts, RetrainingParts, TrainedAgain
from tasks.teaching.run import Run
from tasks.watching.trust import CAPTIONS, CONFIRMED_SHARE, KINDS, LDS, RETRAINED_AGAIN, TEACHER

RETRAINING_CHECK = "retraining check"  # name of the artifact
OVER_MODELS, LOW, HIGH = "lds error over models", "lds low", "lds high"
TWIN_EFFECT = "twin effect"
CONFIRMED = 2.0  # standard errors by which a twin has to help
AHEAD, BESIDE_TEACHER = "lds ahead of captions", "lds ahead of the teacher"
SPLITS = ("validation", "test", TWIN, PSEUDO)


@task(task_run_name="retraining check", cache_policy=NO_CACHE)
def check_by_retraining(run: Run, ranks: Artifact) -> Made:
    """Measure whether the teacher's scores, cheap rankings beside them and its tiers of answers predict retraining.

    Heads, sketches and rivals are judged where they are there, and anew when there are others. A method is asked on the
    queries of each split, and on those of the twin test. The ceiling is what the losses of the same subsets from
    another seed allow. Where models were trained without what methods named, these are compared, too.
    """
    pool = run.artifacts[RetrainingParts.kind]
    judge, features = run.config.judge, features_key(run.context, run.artifacts["samples"])
    tiers, near = Tiers.of(run), run.config.candidates.space
    beside_teacher = [*tiers.key(run), Rivals.of(run).key]
    key = input_key(
        "retraining check 5", ranks.key, pool.key, judge, features, near, beside_teacher, table=tables.METRICS
    )
    path = run.workspace.teacher_check(key)

    listed, distances = run.workspace.retraining_list(run.name), run.workspace.regeneration_distances(run.name)
    drawn_again = judge is not None and judge.regenerate

    def make(started: float) -> Manifest:
        if drawn_again:
            far = regeneration_distances(run)
            commit_table(distances, far, tables.REGENERATION_DISTANCES, key=key, started=started)
        models = pa.Table.from_pylist(list(_models(run)), schema=tables.RETRAININGS.schema)
        commit_table(listed, models, tables.RETRAININGS, key=key, started=started)
        table = pa.Table.from_pylist(_rows(run, ranks, tiers), schema=tables.METRICS.schema)
        return commit_table(path, table, tables.METRICS, key=key, started=started)

    beside = [listed, distances] if drawn_again else [listed]
    return once(Artifact(RETRAINING_CHECK, key, path, 0), path, make, beside=beside)


def _models(run: Run) -> Iterator[dict[str, object]]:
    """Yield a row of `retrainings` for each model; of what several methods named alike, one for each."""
    for kind in (RetrainingParts.kind, RemovalParts.kind):
        if kind not in run.parts:
            continue
        parts = run.parts[kind]
        assert isinstance(parts, TrainedAgain)
        for each, reason in parts.reasons():
            kept = each.kept(parts.config, parts.latents.rows)
            yield {
                "retraining": each.id(parts.config, parts.latents.rows),
                "recipe": parts.artifact.key,
                "seed": each.seed,
                "method": reason.method,
                "k": reason.k,
                "samples_left": int(kept.sum()),
                "removed": (~kept).nonzero().flatten().tolist(),
                "query_id": reason.query_id,
            }


def _rows(run: Run, ranks: Artifact, tiers: Tiers) -> list[dict[str, object]]:
    pool, queries = RetrainedPool.of(run), load_queries(run.artifacts["queries"])
    scores = every_method(run, ranks, tiers)
    scores |= ensemble_scores(run, ranks)
    rows: list[dict[str, object]] = []
    for split in SPLITS:
        chosen = [number for number, query in enumerate(queries) if query.split == split]
        if not chosen:
            continue
        names = [queries[number].query_id for number in chosen]
        methods = {name: each[chosen] for name, each in scores.items()}
        judged = {name: linear_datamodelling(pool.kept, each, pool.losses[:, chosen]) for name, each in methods.items()}
        rows += _lds_rows(judged, names, split)
        for metric, other in ((AHEAD, CAPTIONS), (BESIDE_TEACHER, TEACHER)):
            for name in (name for name in judged if other in judged and name != other):
                rows += _summary(metric, name, judged[name].ahead_of(judged[other]), split)
        if pool.again is not None:
            first = pool.losses[: len(pool.again), chosen]
            rows.append(metric_row(LDS, RETRAINED_AGAIN, reliability(first, pool.again[:, chosen]), split=split))
    # What a rival was not asked for comes last where a twin is looked for.
    scores |= Rivals.of(run).scores(left_out=-torch.inf)
    rows += _twin_rows(run, queries, scores, inclusion_effects(pool.kept, pool.losses))
    if run.config.judge is not None and run.config.judge.leave_out is not None:
        removals = Removals.of(run)
        rows += [*leave_out_rows(run, removals), *leave_k_out_rows(run, removals)]
    return rows


def _twin_rows(
    run: Run, queries: Sequence[Query], scores: Mapping[str, Tensor], effects: tuple[Tensor, Tensor]
) -> list[dict[str, object]]:
    """Return what training on each twin did to its query, and which methods rank twins first.

    A twin is confirmed where models that were trained on it know the query better by two standard errors. Of all twins
    the teacher's own test says how many it finds.

    Args:
        effects: by `inclusion_effects`.
    """
    twins = load_twins(run.artifacts["queries"].path)
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        chosen = [number for number, query in enumerate(queries) if query.split == kind]
        if not chosen:
            continue
        places = torch.tensor([twins[queries[number].query_id] for number in chosen])
        effect, error = (each[chosen, places] for each in effects)
        confirmed = effect < -CONFIRMED * error  # never of NaN
        rows += [
            metric_row(TWIN_EFFECT, RETRAINED_AGAIN, value[None], query_id=queries[number].query_id, split=kind)
            | {"standard_error": float(its_error)}
            for number, value, its_error in zip(chosen, effect, error, strict=True)
            if value.isfinite()
        ]
        for name, each in scores.items():
            ranks = twin_ranks(each[chosen], places)
            first = first_places(each.shape[1])
            if confirmed.any():
                rows.append(metric_row(CONFIRMED_SHARE, name, (ranks <= first)[confirmed].double(), split=kind))
            if name != TEACHER:
                rows += twin_rows(TwinTest(tuple(ranks.tolist()), (first,) * len(ranks)), name, kind)
    return rows


def _lds_rows(judged: Mapping[str, Lds], names: Sequence[str], split: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, found in judged.items():
        rows += _summary(LDS, name, found, split)
        rows += [row | {"split": split} for row in metric_rows(LDS, name, found.by_query, names)][1:]
    return rows


def _summary(metric: str, name: str, found: Lds, split: str) -> list[dict[str, object]]:
    """Return the mean with its error over queries, the other error, and the interval over models."""
    low, high = found.interval
    others = (
        {OVER_MODELS: found.over_models, LOW: low, HIGH: high}
        if metric == LDS
        else {f"{metric}, error over models": found.over_models}
    )
    alone = {each: torch.tensor([value], dtype=torch.float64) for each, value in others.items()}
    count = {"queries": len(found.by_query)}
    return [
        metric_row(metric, name, found.by_query, split=split),
        *(metric_row(each, name, value, split=split) | count for each, value in alone.items()),
    ]
