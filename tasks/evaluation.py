"""Measure rankings against the teacher on the test queries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.evaluation.ranking_metrics import (
    agreement,
    expected_random_agreement,
    spearman,
)
from fastgda_core.features import cosines, text_space
from storage_schemas import tables
from storage_schemas.commit import commit_table, committed, input_key
from tasks.context import Context, Stage
from tasks.features import extract_features, in_space, load_features, load_query_features
from tasks.head import load_trained_head, rows_of_split, score_matrix
from tasks.metric_rows import agreement_rows, metric_row, metric_rows
from tasks.publish import load_ranks
from tasks.queries import joined_queries

CAPTIONS = "captions alone"


@task(task_run_name="evaluation", cache_policy=NO_CACHE)
def measure_head(
    context: Context,
    samples: Stage,
    queries: Sequence[Stage],
    ranks: Stage,
    head: Stage,
    checks: list[Stage],
) -> Stage:
    """How far the untuned and tuned features and chance rank as the teacher does, beside what its checks found."""
    cutoffs = context.config.evaluation.cutoffs
    exact = next((check for check in checks if check.name == "exact check"), None)
    others = [check for check in checks if check is not exact]
    key = input_key(
        "metrics 3", head.key, ranks.key, cutoffs, exact.key if exact else None, [check.key for check in others]
    )
    path = context.workspace.metrics(key)
    manifest = committed(path, key)
    reused = manifest is not None
    if manifest is None:
        started = time.monotonic()
        test = rows_of_split(queries, "test")
        scores = score_matrix(context, ranks, queries, samples, test)
        phi = load_query_features(context, queries, samples)[test], load_features(context, samples, samples)
        head_module = load_trained_head(head.path)
        rankings = {
            "untuned": cosines(*phi),
            "tuned": head_module(phi[0]) @ head_module(phi[1]).T,
            **_by_captions(context, samples, queries, test),
        }
        several = joined_queries(queries)
        names = [several[row].query_id for row in test.tolist()]
        rows = list(_ranking_rows(scores, rankings, cutoffs, names))
        if exact is not None:
            rows += _teacher_rows(context, ranks, exact)
        table = pa.concat_tables(
            [
                pa.Table.from_pylist(rows, schema=tables.METRICS.schema),
                *(tables.read(check.path, tables.METRICS) for check in others),
            ]
        )
        manifest = commit_table(path, table, tables.METRICS, key=key, started=started)
    return Stage("evaluation", key, path, manifest.rows, manifest.seconds, reused)


def _by_captions(context: Context, samples: Stage, queries: Sequence[Stage], test: Tensor) -> dict[str, Tensor]:
    """The cheapest ranking, which any other has to beat: by the captions' features alone, where there are such."""
    space = context.config.features.space
    if text_space(space) in ("", space):
        return {}
    worded = in_space(context, space=text_space(space))
    for items in (samples, *queries):
        extract_features.fn(worded, items)
    phi = load_query_features(worded, queries, samples)[test], load_features(worded, samples, samples)
    return {CAPTIONS: cosines(*phi)}


def _ranking_rows(
    scores: Tensor, rankings: dict[str, Tensor], cutoffs: list[int], query_ids: list[str]
) -> Iterator[dict[str, object]]:
    candidates = scores.isfinite()
    for space, similarity in rankings.items():
        measured = [
            agreement(teacher[known][None], mine[known][None], cutoffs)
            for teacher, mine, known in zip(scores, similarity, candidates, strict=True)
        ]
        yield from agreement_rows(space, measured, query_ids)
    by_chance = [
        expected_random_agreement(teacher[known], cutoffs) for teacher, known in zip(scores, candidates, strict=True)
    ]
    for metric, cutoff in by_chance[0]:
        values = torch.tensor([one[metric, cutoff] for one in by_chance], dtype=torch.float64)
        yield metric_row(metric, "chance", values, cutoff=cutoff)


def _teacher_rows(context: Context, ranks: Stage, exact: Stage) -> list[dict[str, object]]:
    """Spearman between exact and first-order scores of each checked query, and their mean."""
    checked = tables.read_parts(exact.path, tables.SCORES).rename_columns({"score": "exact"})
    first_order = load_ranks(context, ranks, pc.unique(checked["query_id"]).to_pylist()).drop_columns(
        ["rank", "rank_label"]
    )
    joined = checked.join(first_order, keys=["query_id", "train_id"])
    query_ids = pc.unique(joined["query_id"]).to_pylist()
    values = []
    for query_id in query_ids:
        pairs = joined.filter(pc.equal(joined["query_id"], query_id))
        first, second = (torch.from_numpy(pairs[name].to_numpy().copy())[None] for name in ("exact", "score"))
        values.append(spearman(first, second))
    return list(metric_rows("spearman", "exact vs first order", torch.cat(values), query_ids))
