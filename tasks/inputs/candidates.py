"""Candidates: the training samples that a query is scored against."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table
from tasks.artifact import Artifact, Made, once
from tasks.config.inputs import CandidatesConfig
from tasks.context import Context
from tasks.inputs.features import extract_features, in_space, load_features, map_features
from tasks.inputs.mapped_samples import MAPPED_FROM
from tasks.inputs.queries import load_queries
from tasks.inputs.twins import load_twins

QUERIES_AT_ONCE, SAMPLES_AT_ONCE = 64, 65_536
MOST_SIMILARITIES = 2**26  # in memory at a time: 256 MB
LEAST_BYTES = 2 * 4 * 256  # of a sample's features while neighbours are found: float32, read and made unit length


def check_neighbours(config: CandidatesConfig, samples: int) -> None:
    """Check, before any feature is made, that the matrix in which neighbours are found fits into memory.

    Raises:
        UsageError: it does not.
    """
    wanted, there = samples * LEAST_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.policy != "all" and wanted > there:
        raise UsageError(
            f"candidates.policy {config.policy} finds neighbours in a matrix in memory: the features of {samples:,} "
            f"samples take {wanted / 1e9:,.0f} GB or more and this machine has {there / 1e9:,.0f} GB. Put fewer images "
            "into data.shards, as those that an index of your own names (docs/scale.md), or run the plan elsewhere"
        )


def candidate_space(context: Context) -> Context:
    """Return the context whose section `features` is the space in which candidates are near."""
    return in_space(context, space=context.config.candidates.space or context.config.features.space)


def candidate_features(context: Context, samples: Artifact, queries: Artifact) -> list[Made]:
    """Extract features of samples and queries in the candidates' space; none where it is the head's own space."""
    near = candidate_space(context)
    if near == context:
        return []
    extracted = [extract_features(near, items) for items in (samples, queries)]
    return [
        replace(made, artifact=replace(made.artifact, name=f"{made.artifact.name} for candidates"))
        for made in extracted
    ]


@task(task_run_name="candidates", cache_policy=NO_CACHE)
def choose_candidates(context: Context, run: str, samples: Artifact, queries: Artifact) -> Made:
    """Choose each query's candidates, by `candidates.policy`, with their place among its neighbours."""
    path = context.workspace.candidates(run)

    def make(started: float) -> Manifest:
        near = candidate_space(context)
        # Those of many samples stay on disk.
        load = load_features(near, samples, samples) if samples.rows < MAPPED_FROM else map_features(near, samples)
        sample_features = load.numpy()
        query_features = torch.nn.functional.normalize(load_features(near, queries, samples), dim=1).numpy()
        names = [query.query_id for query in load_queries(queries)]
        twins = load_twins(queries.path)
        wanted = [twins.get(name) for name in names]
        parts = [
            tables.CANDIDATES.rows(
                query_id=np.repeat(np.array(names[number : number + 1], dtype=object), len(train_ids)),
                train_id=train_ids,
                neighbor_rank=ranks[train_ids],
                similarity=similarity[train_ids],
            )
            for number, train_ids, ranks, similarity in _chosen(
                context.config.candidates, query_features, sample_features, wanted
            )
        ]
        return commit_table(path, pa.concat_tables(parts), tables.CANDIDATES, key=run, started=started)

    return once(Artifact("candidates", run, path, 0), path, make)


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
        if config.scored is not None:
            draw = np.random.default_rng([config.seed, number])
            mine = mine[np.sort(draw.choice(len(mine), config.scored, replace=False))]
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
