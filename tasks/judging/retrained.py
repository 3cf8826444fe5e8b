"""Hold the teacher against models that were trained again: the linear datamodelling score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.evaluation.lds import Lds, difference, linear_datamodelling, reliability
from fastgda_core.features import text_space
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from storage_schemas.tables import PSEUDO, TWIN
from tasks.artifact import Artifact, Made, once
from tasks.distilling.ranks import candidate_scores
from tasks.inputs.features import extract_features, features_key, in_space, load_features
from tasks.inputs.queries import load_queries
from tasks.judging.head import CAPTIONS
from tasks.judging.metric_rows import metric_row, metric_rows
from tasks.teaching.retrainings import RetrainingParts
from tasks.teaching.run import Run
from tasks.watching.trust import TEACHER

LDS, CEILING, RANDOM, UNTUNED = "lds", "retraining again", "random", "untuned"
OVER_MODELS, LOW, HIGH, AHEAD = "lds error over models", "lds low", "lds high", "lds ahead of captions"
SPLITS = ("validation", "test", TWIN, PSEUDO)


@task(task_run_name="retraining check", cache_policy=NO_CACHE)
def check_by_retraining(run: Run, ranks: Artifact) -> Made:
    """Measure whether the teacher's scores, and cheap rankings beside them, predict what retraining did.

    A method is asked on the queries of each split, and on those of the twin test. The ceiling is what the losses of the
    same subsets from another seed allow.
    """
    pool = run.artifacts[RetrainingParts.kind]
    judge, features = run.config.judge, features_key(run.context, run.artifacts["samples"])
    key = input_key("retraining check", ranks.key, pool.key, judge, features, table=tables.METRICS)
    path = run.workspace.teacher_check(key)

    def make(started: float) -> Manifest:
        table = pa.Table.from_pylist(_rows(run, ranks), schema=tables.METRICS.schema)
        return commit_table(path, table, tables.METRICS, key=key, started=started)

    return once(Artifact("retraining check", key, path, 0), path, make)


def _rows(run: Run, ranks: Artifact) -> list[dict[str, object]]:
    parts = run.parts[RetrainingParts.kind]
    assert isinstance(parts, RetrainingParts)
    config, samples = parts.config, run.artifacts["samples"].rows
    losses = {each: parts.losses(number).mean(0) for number, each in enumerate(parts.pool)}
    subsets = [each for each in parts.pool if each.subset is not None and each.seed == config.seed]
    again = [each for each in parts.pool if each.seed != config.seed]
    kept = torch.stack([each.kept(config, samples) for each in subsets])
    of_subsets = torch.stack([losses[each] for each in subsets])
    queries = load_queries(run.artifacts["queries"])
    rows: list[dict[str, object]] = []
    for split in SPLITS:
        chosen = [number for number, query in enumerate(queries) if query.split == split]
        if not chosen:
            continue
        names = [queries[number].query_id for number in chosen]
        methods = _methods(run, ranks, chosen, names)
        judged = {name: linear_datamodelling(kept, scores, of_subsets[:, chosen]) for name, scores in methods.items()}
        rows += _lds_rows(judged, names, split)
        if CAPTIONS in methods:
            lead = difference(kept, methods[TEACHER], methods[CAPTIONS], of_subsets[:, chosen])
            rows += _summary(AHEAD, TEACHER, lead, split)
        if again:
            twice = torch.stack([losses[each] for each in again])[:, chosen]
            once_ = of_subsets[: len(again)][:, chosen]
            rows.append(metric_row(LDS, CEILING, reliability(once_, twice), split=split))
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


def _methods(run: Run, ranks: Artifact, chosen: list[int], names: list[str]) -> dict[str, Tensor]:
    """Return scores of all samples by method, (queries, samples) float64; of samples that a method left out, 0."""
    context, samples, queries = run.context, run.artifacts["samples"], run.artifacts["queries"]
    labels = candidate_scores(run.workspace, ranks, names)
    teacher = torch.zeros(len(names), samples.rows, dtype=torch.float64)
    for row, (train_ids, scores, known) in enumerate(zip(labels.train_ids, labels.scores, labels.known, strict=True)):
        teacher[row, train_ids[known].long()] = scores[known].double()
    found = {TEACHER: teacher}
    spaces = {UNTUNED: context}
    words = text_space(context.config.features.space)
    if words and words != context.config.features.space:
        spaces[CAPTIONS] = in_space(context, space=words)
    for name, space in spaces.items():
        for items in (samples, queries):
            extract_features.fn(space, items)
        phi = [F.normalize(load_features(space, items, samples).double(), dim=1) for items in (queries, samples)]
        found[name] = phi[0][chosen] @ phi[1].T
    draw = torch.Generator().manual_seed(run.config.judge.seed if run.config.judge else 0)
    found[RANDOM] = torch.randn(teacher.shape, generator=draw, dtype=torch.float64)
    return found
