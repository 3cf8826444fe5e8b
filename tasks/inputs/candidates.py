"""Candidates: the training samples that a query is scored against."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit, input_key
from tasks.artifact import Artifact, Made, once
from tasks.config.inputs import CandidatesConfig
from tasks.context import Context
from tasks.inputs.features import extract_features, features_key, in_space, load_features, map_features
from tasks.inputs.index_rows import join_rows, map_rows, opened
from tasks.inputs.mapped_samples import MAPPED_FROM
from tasks.inputs.near_rows import drawn_places, index_space, near_rows, open_near, query_vectors
from tasks.inputs.queries import load_queries
from tasks.inputs.twins import load_twins
from tasks.progress import console

QUERIES_AT_ONCE, SAMPLES_AT_ONCE = 64, 65_536
MOST_SIMILARITIES = 2**26  # in memory at a time: 256 MB
MEASURED = ("validation", "test")  # splits whose queries need more candidates than any cutoff
LEAST_BYTES = 2 * 4 * 256  # of a sample's features while neighbours are found: float32, read and made unit length


def check_neighbours(config: CandidatesConfig, samples: int) -> None:
    """Check, before any feature is made, that the matrix in which neighbours are found fits into memory.

    Raises:
        UsageError: it does not.
    """
    wanted, there = samples * LEAST_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.policy != "all" and config.index is None and wanted > there:
        raise UsageError(
            f"candidates.policy {config.policy} finds neighbours in a matrix in memory: the features of {samples:,} "
            f"samples take {wanted / 1e9:,.0f} GB or more and this machine has {there / 1e9:,.0f} GB. Let an index "
            "name them, candidates.index (docs/existing-index.md), or run the plan elsewhere"
        )


def candidate_space(context: Context) -> Context:
    """Return the context whose section `features` is the space in which candidates are near."""
    if context.config.candidates.index is not None:
        return index_space(context)
    return in_space(context, space=context.config.candidates.space or context.config.features.space)


def candidates_key(context: Context, samples: Artifact, queries: Artifact) -> list[str]:
    """Return the keys of what candidates are chosen by; none where every sample is one.

    Then they depend on no features: the head's may change, and the scores stay.
    """
    config, near = context.config.candidates, candidate_space(context)
    if config.policy == "all":
        return []
    if config.index is None:
        return [features_key(near, samples)]
    chosen_by = opened(config).key, config.index.nprobe, config.index.match
    return [input_key("candidates by an index", features_key(near, queries), *chosen_by)]


def candidate_features(context: Context, samples: Artifact, queries: Artifact) -> list[Made]:
    """Extract features of samples and queries in the candidates' space; none where it is the head's own space.

    An index has those of the samples.
    """
    near = candidate_space(context)
    if near == context:
        return []
    of_index = context.config.candidates.index is not None
    if of_index:  # before the features of all samples are made for the head
        query_vectors(context, queries, open_near(context.config.candidates).width)
    several = (queries,) if of_index else (samples, queries)
    extracted = [extract_features(near, items) for items in several]
    return [
        replace(made, artifact=replace(made.artifact, name=f"{made.artifact.name} for candidates"))
        for made in extracted
    ]


@task(task_run_name="candidates", cache_policy=NO_CACHE)
def choose_candidates(context: Context, run: str, samples: Artifact, queries: Artifact) -> Made:
    """Choose each query's candidates, by `candidates.policy`, with their place among its neighbours.

    They are written as they are chosen: of 5,000 queries with 20,000 candidates each no more than some queries' are
    in memory.
    """
    path, table = context.workspace.candidates(run), tables.CANDIDATES

    def make(started: float) -> Manifest:
        of_index = context.config.candidates.index is not None
        count = 0

        def counted() -> Iterator[pa.Table]:
            nonlocal count
            for rows in (_of_index if of_index else _of_features)(context, samples, queries):
                count += rows.num_rows
                yield rows

        def write(temporary: Path) -> None:
            table.write(temporary, counted(), {"input_key": run})

        return commit(path, write, key=run, rows=lambda: count, started=started, table=table)

    return once(Artifact("candidates", run, path, 0), path, make)


def _of_features(context: Context, samples: Artifact, queries: Artifact) -> Iterator[pa.Table]:
    """Yield each query's candidates by the features of all samples."""
    query_features, sample_features = _vectors(context, samples, queries)
    names = [query.query_id for query in load_queries(queries)]
    twins = load_twins(queries.path)
    wanted = [twins.get(name) for name in names]
    for number, train_ids, ranks, similarity in _chosen(
        context.config.candidates, query_features, sample_features, wanted
    ):
        yield _rows(names[number], train_ids, ranks[train_ids], similarity[train_ids])


def _of_index(context: Context, samples: Artifact, queries: Artifact) -> Iterator[pa.Table]:
    """Yield each query's candidates by an index: of the rows that are drawn those whose images are there.

    Raises:
        UsageError: a query has too few of them to be measured on.
    """
    config, evaluation = context.config.candidates, context.config.evaluation
    table, twins = map_rows(join_rows(context, samples)), load_twins(queries.path)
    most = max(*evaluation.cutoffs, evaluation.validation_cutoff, evaluation.neighbors)
    asked = there = 0
    several = load_queries(queries)
    for number, similarity, rows in near_rows(context, queries, range(len(several))):
        query = several[number]
        places = drawn_places(config, number, len(rows))
        train_ids = np.asarray(table[rows[places]])
        asked, there = asked + len(places), there + int((train_ids >= 0).sum())
        # Of two rows that are one sample the nearer one counts.
        _, firsts = np.unique(train_ids, return_index=True)
        kept = np.sort(firsts[train_ids[firsts] >= 0])
        mine, ranks, near = train_ids[kept], (places[kept] + 1).astype(np.int32), similarity[places[kept]]
        if query.query_id not in twins and len(mine) <= (most if query.split in MEASURED else 0):
            raise UsageError(
                f"query {query.query_id} has {len(mine)} of the {len(places):,} candidates that are to be scored: the "
                "images of the others are not in data.shards, and evaluation.cutoffs need more: fetch them "
                "(docs/existing-index.md), or lower the cutoffs"
            )
        if (twin := twins.get(query.query_id)) is not None and twin not in mine:
            mine, ranks, near = np.append(mine, twin), np.append(ranks, 0), np.append(near, np.nan)
        yield _rows(query.query_id, mine, ranks, near)
    said = f"candidates: of {asked:,} rows that the index names for the queries {there / max(1, asked):.1%} are there"
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def nearest_of_features(
    context: Context, samples: Artifact, queries: Artifact, numbers: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield number and the `candidates.k` nearest samples of some queries, by the features of all samples."""
    vectors, of_samples = _vectors(context, samples, queries)
    for place, order, _, _ in _neighbors(vectors[list(numbers)], of_samples):
        yield numbers[place], order[: context.config.candidates.k]


def _vectors(context: Context, samples: Artifact, queries: Artifact) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the features in the candidates' space, (., d): unit vectors of queries, of samples of any length."""
    near = candidate_space(context)
    of_queries = torch.nn.functional.normalize(load_features(near, queries, samples), dim=1)
    # Those of many samples stay on disk.
    load = load_features(near, samples, samples) if samples.rows < MAPPED_FROM else map_features(near, samples)
    return of_queries.numpy(), load.numpy()


def _rows(name: str, train_ids: NDArray[np.int64], ranks: NDArray[Any], similarity: NDArray[Any]) -> pa.Table:
    return tables.CANDIDATES.rows(
        query_id=pa.repeat(name, len(train_ids)), train_id=train_ids, neighbor_rank=ranks, similarity=similarity
    )


def _chosen(
    config: CandidatesConfig, queries: NDArray[np.float32], samples: NDArray[np.float32], wanted: Sequence[int | None]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]]:
    """Yield number, candidates (nearest first), rank of every sample and similarity to it, query by query.

    `wanted` is a sample that the query is scored against in any case: its twin.
    """
    pool: NDArray[np.int64] | None = None
    if config.policy == "pooled":
        # A query of the twin test adds nothing to the pool that the others are scored against.
        every = _neighbors(queries, samples)
        near = [order[: config.k].copy() for number, order, _, _ in every if wanted[number] is None]
        pool = np.unique(np.concatenate(near))
    for number, order, ranks, similarity in _neighbors(queries, samples):
        # A copy, as a slice would keep the order of all samples.
        mine = order[: config.k].copy() if pool is None else pool[np.argsort(ranks[pool])]
        mine = mine[drawn_places(config, number, len(mine))]
        if (twin := wanted[number]) is not None and twin not in mine:
            mine = np.append(mine, twin)
            mine = mine[np.argsort(ranks[mine])]
        yield number, mine, ranks, similarity


def _neighbors(
    queries: NDArray[np.float32], samples: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]]:
    """Yield each query's number, all samples nearest first, their ranks and cosines.

    Args:
        queries: unit vectors, (queries, d).
        samples: vectors of any length, (samples, d).
    """
    at_once = max(1, min(QUERIES_AT_ONCE, MOST_SIMILARITIES // max(1, len(samples))))
    for start in range(0, len(queries), at_once):
        for offset, similarity in enumerate(_cosines(queries[start : start + at_once], samples)):
            order = np.argsort(-similarity, kind="stable")
            ranks = np.empty(len(order), dtype=np.int32)
            ranks[order] = np.arange(1, len(order) + 1)
            yield start + offset, order, ranks, similarity


def _cosines(queries: NDArray[np.float32], samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosines of unit vectors with vectors of any length, (queries, samples), some samples at a time."""
    found = np.empty((len(queries), len(samples)), np.float32)
    for start in range(0, len(samples), SAMPLES_AT_ONCE):
        some = samples[start : start + SAMPLES_AT_ONCE]
        lengths = np.maximum(np.linalg.norm(some, axis=1, keepdims=True), 1e-12)
        found[:, start : start + len(some)] = queries @ (some / lengths).T
    return found
