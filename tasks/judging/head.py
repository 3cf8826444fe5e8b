"""Measure rankings against the teacher on the test queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.evaluation.candidates import CandidateScores
from fastgda_core.evaluation.ranking_metrics import (
    agreement,
    expected_random_agreement,
    spearman,
)
from fastgda_core.features import text_space
from fastgda_core.ranking.head import RankHead
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from storage_schemas.heads.evaluations import EvaluationRecord, write_evaluation
from storage_schemas.heads.records import EXACT_CHECK
from storage_schemas.snapshots.snapshots import read_ranks
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made, once
from tasks.context import Context
from tasks.distilling.answering import Answering, answering_head
from tasks.distilling.ranks import candidate_scores, rows_of_split, sample_features
from tasks.inputs.features import extract_features, in_space, load_query_features
from tasks.inputs.queries import joined_queries
from tasks.judging.metric_rows import agreement_rows, metric_row, metric_rows
from tasks.watching.trust import CAPTIONS


@task(task_run_name="evaluation", cache_policy=NO_CACHE)
def measure_head(
    context: Context,
    samples: Artifact,
    queries: Sequence[Artifact],
    ranks: Artifact,
    head: Artifact,
    checks: list[Artifact],
) -> Made:
    """Measure how far untuned and tuned features and chance rank as the teacher does; add what its checks found."""
    cutoffs = context.config.evaluation.cutoffs
    exact = next((check for check in checks if check.name == EXACT_CHECK), None)
    others = [check for check in checks if check is not exact]
    behind = [exact.key if exact else None, [check.key for check in others]]
    key = input_key("metrics 3", head.key, ranks.key, cutoffs, *behind, table=tables.METRICS)
    path = context.workspace.metrics(key)

    def make(started: float) -> Manifest:
        rows = list(_head_rows(context, samples, queries, ranks, head))
        if exact is not None:
            rows += _teacher_rows(context.workspace, ranks, exact)
        measured = pa.Table.from_pylist(rows, schema=tables.METRICS.schema)
        table = pa.concat_tables([measured, *(tables.read(check.path, tables.METRICS) for check in others)])
        return commit_table(path, table, tables.METRICS, key=key, started=started)

    made = once(Artifact("evaluation", key, path, 0), path, make, alone_in=context.workspace)
    write_evaluation(context.workspace, key, EvaluationRecord(head=head.key, snapshot=ranks.key))
    return made


def _head_rows(
    context: Context, samples: Artifact, queries: Sequence[Artifact], ranks: Artifact, head: Artifact
) -> Iterator[dict[str, object]]:
    """Measure how the head, the features alone and the captions alone agree with the teacher on the test queries."""
    test, several = rows_of_split(queries, "test"), joined_queries(queries)
    names = [several[row].query_id for row in test.tolist()]
    scores = candidate_scores(context.workspace, ranks, names)
    captions = [several[row].caption for row in test.tolist()]
    phi = load_query_features(context, queries, samples)[test], sample_features(context, samples)
    rankings = {
        "untuned": untuned_cosines(scores, *phi),
        "tuned": answers(scores, answering_head(context.workspace, head.path), captions, *phi),
        **_by_captions(context, samples, queries, test, scores),
    }
    return _ranking_rows(scores, rankings, context.config.evaluation.cutoffs, names)


def untuned_cosines(scores: CandidateScores, queries: Tensor, samples: Tensor) -> Tensor:
    """Return the features' cosine of each query, (queries, d), and its candidates among samples, (samples, d)."""
    return scores.cosines(F.normalize(queries, dim=1), lambda rows: F.normalize(samples[rows], dim=1))


def tuned_cosines(scores: CandidateScores, head: RankHead, queries: Tensor, samples: Tensor) -> Tensor:
    """Return a head's cosine of each query, (queries, d), and its candidates among samples, (samples, d)."""
    return scores.cosines(head.queries(queries), lambda rows: head(samples[rows]))


def answers(
    scores: CandidateScores, head: Answering, captions: Sequence[str], queries: Tensor, samples: Tensor
) -> Tensor:
    """Return how a head ranks each query's candidates, from captions and phi of queries and phi of samples."""
    return scores.cosines(head.queries(queries, captions), lambda rows: head.samples(rows, samples[rows]))


def _by_captions(
    context: Context, samples: Artifact, queries: Sequence[Artifact], test: Tensor, scores: CandidateScores
) -> dict[str, Tensor]:
    """Rank by the captions' features alone, where there are such: the cheapest ranking, which any has to beat."""
    space = context.config.features.space
    if text_space(space) in ("", space):
        return {}
    worded = in_space(context, space=text_space(space))
    for items in (samples, *queries):
        extract_features.fn(worded, items)
    phi = load_query_features(worded, queries, samples)[test], sample_features(worded, samples)
    return {CAPTIONS: untuned_cosines(scores, *phi)}


def _ranking_rows(
    candidates: CandidateScores, rankings: dict[str, Tensor], cutoffs: list[int], query_ids: list[str]
) -> Iterator[dict[str, object]]:
    of_queries = list(zip(candidates.scores, candidates.known, strict=True))
    for space, similarity in rankings.items():
        measured = [
            agreement(teacher[known][None], mine[known][None], cutoffs)
            for (teacher, known), mine in zip(of_queries, similarity, strict=True)
        ]
        yield from agreement_rows(space, measured, query_ids)
    by_chance = [expected_random_agreement(teacher[known], cutoffs) for teacher, known in of_queries]
    for metric, cutoff in by_chance[0]:
        values = torch.tensor([one[metric, cutoff] for one in by_chance], dtype=torch.float64)
        yield metric_row(metric, "chance", values, cutoff=cutoff)


def _teacher_rows(workspace: Workspace, ranks: Artifact, exact: Artifact) -> list[dict[str, object]]:
    """Return Spearman between exact and first-order scores of each checked query, and their mean."""
    pair = ["query_id", "train_id"]
    checked = tables.read_parts(exact.path, tables.SCORES).select([*pair, "score"]).rename_columns({"score": "exact"})
    first_order = read_ranks(workspace, ranks.key, pc.unique(checked["query_id"]).to_pylist())
    joined = checked.join(first_order.select([*pair, "score"]), keys=pair)
    query_ids = pc.unique(joined["query_id"]).to_pylist()
    values = []
    for query_id in query_ids:
        pairs = joined.filter(pc.equal(joined["query_id"], query_id))
        first, second = (torch.from_numpy(pairs[name].to_numpy().copy())[None] for name in ("exact", "score"))
        values.append(spearman(first, second))
    return list(metric_rows("spearman", "exact vs first order", torch.cat(values), query_ids))
