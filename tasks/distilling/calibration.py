"""What a head's similarity says of the teacher's rank and score: learned on validation queries, checked on test ones.

A head is learned to order samples, and its similarities have no unit. The teacher has ranked and scored the samples of
the validation queries, so that means over pairs of like similarity are known, made monotone, and interpolated. A
gradient head's are the samples' own gradients: it learned from no training query, so these count, too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage_schemas.commit import Manifest, commit, input_key
from storage_schemas.heads.records import (
    Calibration,
    Curve,
    as_json,
    read_calibration_record,
    read_head_record,
)
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made, once
from tasks.context import Context
from tasks.distilling.answering import answering_head
from tasks.distilling.ranks import candidate_scores, rows_of_split, sample_features
from tasks.inputs.features import load_query_features
from tasks.inputs.queries import joined_queries

MOST_QUERIES = 256
DRAWN = 1024  # samples whose similarities to a query stand for those of all
FIRST = 100  # samples of a query by the head, on which a calibration is checked: the rest is asked by nobody
LEAST_EXPLAINED = 0.2  # share of the variance among these that a curve must explain, or it is not believed
_GROWTH, _LEAST = 1.2, 20  # pairs of a bin, from the nearest on: few where the curve is steep

Values = NDArray[np.float64]


def drawn_samples(samples: int) -> NDArray[np.int64]:
    """Return the train_ids of the samples that stand for all, ascending: the same ones each time."""
    return np.sort(np.random.default_rng(0).choice(samples, min(samples, DRAWN), replace=False))


@task(task_run_name="calibration", cache_policy=NO_CACHE)
def calibrate(
    context: Context, samples: Artifact, queries: Sequence[Artifact], ranks: Artifact, head: Artifact, metrics: Artifact
) -> Made:
    """Calibrate a head beside its metrics: what its similarities say of rank and score, and how far that is true."""
    key = input_key("calibration", head.key, ranks.key)
    path = context.workspace.calibration(metrics.key)

    def make(started: float) -> Manifest:
        kind = read_head_record(head.path).kind
        splits = ("validation", "train") if kind == "gradient" else ("validation",)
        pairs_of = _pairs_by_split(context, samples, queries, ranks, head)
        found = fit([pairs for split in splits for pairs in pairs_of(split)])
        checked = check(found, pairs_of("test"))
        write = functools.partial(Path.write_bytes, data=as_json(checked))
        return commit(path, write, key=key, rows=checked.queries, started=started)

    return once(Artifact("calibration", key, path, 0), path, make)


class Pairs:
    """The pairs of one query and its candidates, nearest first: how near, and the teacher's rank and score of each."""

    def __init__(self, similarity: Values, drawn: Values, scores: Values) -> None:
        order = np.argsort(-similarity, kind="stable")
        self.similarity, self.scores = similarity[order], scores[order]
        self.nearness = nearness(self.similarity, drawn)
        ascending = np.sort(scores)
        at_least = len(scores) - np.searchsorted(ascending, self.scores, side="left")
        self.log_rank = np.log(at_least / len(scores))  # ties at the last rank, as rank labels have them


def nearness(similarity: Values, drawn: Values) -> Values:
    """Return similarities in deviations of those of the drawn samples, (DRAWN,), above their mean."""
    deviation = float(drawn.std())
    return (similarity - drawn.mean()) / (deviation or 1.0)


def fit(several: Sequence[Pairs]) -> Calibration:
    """Return the curves of some queries' pairs; empty ones where there are no pairs."""
    return Calibration(
        queries=len(several),
        rank=_curve(several, "nearness", "log_rank", falling=True),
        score=_curve(several, "similarity", "scores", falling=False),
    )


def check(found: Calibration, several: Sequence[Pairs]) -> Calibration:
    """Return a calibration with what its curves are worth for the first samples of other queries."""
    first = slice(0, FIRST)
    rank, score = (
        _explained(curve, [(getattr(pairs, x)[first], getattr(pairs, y)[first]) for pairs in several])
        for curve, x, y in ((found.rank, "nearness", "log_rank"), (found.score, "similarity", "scores"))
    )
    within = [
        np.abs(pairs.scores[first] - value) <= 2 * error
        for pairs in several
        for value, error in [interpolated(found.score, pairs.similarity[first])]
    ]
    covered = float(np.concatenate(within).mean()) if within and found.score.x else 0.0
    checked = {"test_queries": len(several), "rank_explained": rank, "score_explained": score, "covered": covered}
    return found.model_copy(update=checked)


def interpolated(curve: Curve, x: Values) -> tuple[Values, Values]:
    """Return the curve's values and standard errors at some places; beyond its ends those of the ends."""
    if not curve.x:
        return np.full(len(x), np.nan), np.full(len(x), np.nan)
    return np.interp(x, curve.x, curve.y), np.interp(x, curve.x, curve.error)


def _explained(curve: Curve, several: Sequence[tuple[Values, Values]]) -> float:
    if not several or not curve.x:
        return 0.0
    x, y = (np.concatenate([each[place] for each in several]) for place in (0, 1))
    total = float(np.square(y - y.mean()).sum())
    return 1 - float(np.square(y - interpolated(curve, x)[0]).sum()) / total if total else 0.0


def _curve(several: Sequence[Pairs], x: str, y: str, *, falling: bool) -> Curve:
    """Return means of y over pairs of like x, monotone, with the deviation of single pairs from them."""
    if not several:
        return Curve()
    xs, ys = (np.concatenate([getattr(pairs, name) for pairs in several]) for name in (x, y))
    order = np.argsort(-xs, kind="stable")
    bins = [order[start:end] for start, end in _bins(len(order))]
    values = np.array([ys[each].mean() for each in bins])
    counts = np.array([len(each) for each in bins], np.float64)
    # From the nearest bin on a score falls and a rank grows.
    values = _rising(values, counts) if falling else -_rising(-values, counts)
    errors = np.array([np.sqrt(np.square(ys[each] - value).mean()) for each, value in zip(bins, values, strict=True)])
    centres = np.array([xs[each].mean() for each in bins])
    return Curve(x=centres[::-1].tolist(), y=values[::-1].tolist(), error=errors[::-1].tolist())


def _bins(pairs: int) -> list[tuple[int, int]]:
    edges, size = [0], float(min(_LEAST, pairs))
    while edges[-1] < pairs:
        edges.append(min(pairs, edges[-1] + round(size)))
        size *= _GROWTH
    if len(edges) > 2 and edges[-1] - edges[-2] < _LEAST:
        del edges[-2]  # the rest of the last whole bin
    return list(itertools.pairwise(edges))


def _rising(values: Values, counts: Values) -> Values:
    """Return the nearest values that never fall: neighbours that do are replaced by their mean (pool adjacent)."""
    pools: list[list[float]] = []  # mean, weight, how many
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        pools.append([value, count, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight, many = pools.pop()
            before = pools[-1]
            before[0] = (before[0] * before[1] + mean * weight) / (before[1] + weight)
            before[1], before[2] = before[1] + weight, before[2] + many
    return np.repeat([pool[0] for pool in pools], [int(pool[2]) for pool in pools])


def _pairs_by_split(
    context: Context, samples: Artifact, queries: Sequence[Artifact], ranks: Artifact, head: Artifact
) -> Callable[[str], list[Pairs]]:
    """Return what gives the pairs of the first so many queries of a split; head and features are loaded once."""
    several, of_queries = joined_queries(queries), load_query_features(context, queries, samples)
    answering, phi = answering_head(context.workspace, head.path), sample_features(context, samples)

    def encode(train_ids: Tensor) -> Tensor:
        return answering.samples(train_ids, phi[train_ids])

    drawn = encode(torch.from_numpy(drawn_samples(samples.rows)))

    def pairs_of(split: str) -> list[Pairs]:
        rows = rows_of_split(queries, split)[:MOST_QUERIES]
        if not len(rows):
            return []
        asked = [several[row] for row in rows.tolist()]
        scores = candidate_scores(context.workspace, ranks, [query.query_id for query in asked])
        vectors = answering.queries(of_queries[rows], [query.caption for query in asked])
        similarity, of_drawn = scores.cosines(vectors, encode), (vectors @ drawn.T).double().numpy()
        return [
            Pairs(near[known].double().numpy(), spread, truth[known].numpy())
            for near, known, truth, spread in zip(similarity, scores.known, scores.scores, of_drawn, strict=True)
            if known.any()
        ]

    return pairs_of


def read_calibration(workspace: Workspace, metrics: str) -> Calibration | None:
    """Return the calibration beside these metrics, a file relative to the workspace; None where there is none."""
    return read_calibration_record(workspace.calibration(metrics.rsplit("/", 1)[-1].removesuffix(".parquet")))
