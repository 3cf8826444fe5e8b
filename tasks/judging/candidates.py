"""Check the choice of candidates: which share of the teacher's first is among the nearest that they are taken from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.candidate_recall import ScoredQuery, candidate_recall
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, committed, input_key
from storage_schemas.snapshots.snapshots import read_ranks
from storage_schemas.workspace import part
from tasks.artifact import Artifact, Made, once
from tasks.config.inputs import CandidateCheckConfig
from tasks.inputs.candidates import nearest_of_features
from tasks.inputs.index_rows import join_rows, map_rows
from tasks.inputs.near_rows import near_rows
from tasks.inputs.queries import load_queries
from tasks.inputs.wanted_rows import random_rows
from tasks.judging.metric_rows import metric_row, metric_rows
from tasks.progress import stage
from tasks.teaching.families import family_of
from tasks.teaching.run import Run
from tasks.teaching.sketches import BasisParts, SketchParts
from tasks.watching.trust import CANDIDATE_RECALL, NEAREST

BLOCK = 4096  # samples that are scored at once


@dataclass(frozen=True, eq=False)
class _Population:
    """All samples but each query's nearest, or as many of them as are scored.

    drawn: train_ids, ascending; total: the samples that there are, of which the drawn ones speak for all others.
    near: by the query's number, the train_ids of its nearest, and how many these are, whether or not they are there.
    """

    drawn: NDArray[np.int64]
    total: int
    near: dict[int, tuple[NDArray[np.int64], int]]


@task(task_run_name="candidate check", cache_policy=NO_CACHE)
def check_candidates(run: Run, ranks: Artifact) -> Made:
    """Score other samples than the candidates for some test queries, and measure what the nearest leave out.

    Raises:
        UsageError: the check asks for all samples, and the images of an index are not all there.
    """
    context, config = run.context, run.config.candidates
    assert config.check is not None
    queries = load_queries(run.artifacts["queries"])
    chosen = [number for number, query in enumerate(queries) if query.split == "test"][: config.check.queries]
    cutoffs = run.config.evaluation.cutoffs
    key = input_key("candidate check", ranks.key, config.check, config.k, cutoffs, table=tables.METRICS)
    path = context.workspace.teacher_check(key)

    def make(started: float) -> Manifest:
        assert config.check is not None
        population = _population(run, config.check, chosen)
        outside = _scored(run, population, chosen)
        names = [queries[number].query_id for number in chosen]
        inside = read_ranks(context.workspace, ranks.key, names)
        scored = []
        for number, name in zip(chosen, names, strict=True):
            mine = inside.filter(pc.equal(inside["query_id"], name))
            nearest = population.near[number][1]
            others = population.total - nearest
            scored.append(ScoredQuery(mine["score"].to_numpy(), nearest, outside[number], others))
        rows = [row for cutoff in cutoffs for row in _rows(scored, names, cutoff)]
        table = pa.Table.from_pylist(rows, schema=tables.METRICS.schema)
        return commit_table(path, table, tables.METRICS, key=key, started=started, device=str(context.device))

    return once(Artifact("candidate check", key, path, 0), path, make)


def _rows(scored: list[ScoredQuery], names: list[str], cutoff: int) -> Iterator[dict[str, object]]:
    found = candidate_recall(scored, cutoff)
    if found.each:
        yield from metric_rows(CANDIDATE_RECALL, NEAREST, torch.tensor(found.each), names, cutoff=cutoff)
        return
    row = metric_row(CANDIDATE_RECALL, NEAREST, torch.tensor([found.value]), cutoff=cutoff)
    yield row | {"standard_error": found.error, "queries": len(scored)}


def _population(run: Run, check: CandidateCheckConfig, chosen: list[int]) -> _Population:
    context, samples, queries = run.context, run.artifacts["samples"], run.artifacts["queries"]
    config = context.config.candidates
    if config.index is None:
        every = np.arange(samples.rows)
        if check.random is not None:
            draw = np.random.default_rng([config.seed, samples.rows, check.random])
            every = np.sort(draw.choice(samples.rows, min(samples.rows, check.random), replace=False))
        found = nearest_of_features(context, samples, queries, chosen)
        return _Population(every, samples.rows, {number: (mine, len(mine)) for number, mine in found})
    table = map_rows(join_rows(context, samples))
    near = {}
    for number, _, rows in near_rows(context, queries, chosen):
        near[number] = table[rows], len(rows)
    if check.random is None:
        drawn = np.unique(table[table >= 0])
        if len(drawn) < len(table):
            raise UsageError(
                f"candidates.check asks for all samples, and of the index's {len(table):,} rows {len(drawn):,} are in "
                "data.shards: set candidates.check.random, and fetch these rows (docs/existing-index.md)"
            )
    else:
        drawn = table[random_rows(config, len(table))]
        drawn = np.unique(drawn[drawn >= 0])
    return _Population(drawn, len(table), near)


def _scored(run: Run, population: _Population, chosen: list[int]) -> dict[int, NDArray[np.float64]]:
    """Return each query's scores of the drawn samples that are none of its nearest.

    They are committed block by block, so that a check that was stopped goes on.
    """
    context, family = run.context, family_of(run.config)
    key = input_key("other samples", run.name, chosen, run.config.candidates.check, BLOCK, table=tables.SCORES)
    folder = context.workspace.exact_check(key)
    names = [query.query_id for query in load_queries(run.artifacts["queries"])]
    # Sketches are kept of all samples by parts of their own.
    artifacts = {name: each for name, each in run.artifacts.items() if name not in (SketchParts.kind, BasisParts.kind)}
    at_once = family.shard_shape(run.config, len(chosen))[0]
    groups = [chosen[start : start + at_once] for start in range(0, len(chosen), at_once)]
    found: dict[int, list[NDArray[np.float64]]] = {number: [] for number in chosen}
    with stage("candidate check", len(groups) * len(population.drawn)) as advance:
        blocks = range(0, len(population.drawn), BLOCK)
        for place, (group, start) in enumerate((group, start) for group in groups for start in blocks):
            path, train_ids = part(folder, place), population.drawn[start : start + BLOCK]
            if committed(path, key) is None:
                started = time.monotonic()
                block = family.scores(context, artifacts, group, train_ids)
                asked = np.array([names[number] for number in group], dtype=object)
                rows = tables.SCORES.rows(
                    query_id=np.repeat(asked, len(block.train_ids)),
                    train_id=np.tile(block.train_ids, len(group)),
                    score=block.scores.numpy().ravel(),
                )
                commit_table(path, rows, tables.SCORES, key=key, started=started, device=str(context.device))
            kept = tables.read(path, tables.SCORES)
            for number in group:
                mine = kept.filter(pc.equal(kept["query_id"], names[number]))
                others = ~np.isin(mine["train_id"].to_numpy(), population.near[number][0])
                found[number].append(mine["score"].to_numpy()[others])
            advance(len(train_ids))
    return {number: np.concatenate([np.empty(0), *several]) for number, several in found.items()}
