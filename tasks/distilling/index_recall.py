"""Recall of an index against exact search, on queries that chose none of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgda_core.search.recall import Neighbours, exact_neighbours, measure, perturbed, settings_for
from fastgda_core.search.searcher import Searcher
from storage_schemas.heads.records import IndexRecord
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.answering import answering_head
from tasks.distilling.index_parts import IndexParts
from tasks.distilling.vectors import blocks_of, read_vectors
from tasks.inputs.features import extract_features, load_query_features
from tasks.inputs.queries import joined_queries

TUNING = 128  # vectors that stand for queries, by which settings are chosen
SAMPLED_PARTS = 8  # of which these are drawn
MEASURED = 100  # neighbours


class HeldOut(NamedTuple):
    """Vectors of queries, (n, width), and which these are."""

    vectors: NDArray[np.float32]
    of: str


def held_out_queries(
    context: Context, samples: Artifact, head: Artifact, queries: Sequence[Artifact], parts: IndexParts
) -> HeldOut:
    """Return up to `index.recall_queries` vectors: of queries, and where these are fewer of samples with noise."""
    wanted, several = context.config.index.recall_queries, joined_queries(queries)
    found = np.empty((0, parts.width), np.float32)
    if several:
        for each in queries:
            extract_features.fn(context, each)
        rows = np.unique(np.linspace(0, len(several) - 1, min(wanted, len(several))).round().astype(int))
        phi = load_query_features(context, queries, samples)[rows]
        captions = [several[row].caption for row in rows.tolist()]
        found = answering_head(context.workspace, head.path).queries(phi, captions).float().numpy()
    return filled_up(found, wanted, parts)


def filled_up(queries: NDArray[np.float32], wanted: int, parts: IndexParts) -> HeldOut:
    """Add vectors of samples with noise to those of queries, until there are as many as wanted."""
    said = [f"{len(queries)} queries"] if len(queries) else []
    lacking = wanted - len(queries)
    if lacking > 0:
        queries = np.concatenate([queries, perturbed(_some_vectors(parts), lacking, seed=2)])
        said.append(f"{lacking} samples' vectors with noise of half their length")
    return HeldOut(queries, ", ".join(said))


def _some_vectors(parts: IndexParts) -> NDArray[np.float32]:
    numbers = np.unique(np.linspace(0, len(parts.paths) - 1, SAMPLED_PARTS).round().astype(int))
    return np.concatenate([read_vectors(parts.paths[number]).vectors for number in numbers.tolist()])


def measured(
    index: Any, train_ids: NDArray[np.int64], about: IndexRecord, held_out: HeldOut, parts: IndexParts
) -> IndexRecord:
    """Return the record with the settings that reach its target, and the recall of the held-out queries."""
    searcher = Searcher(index, train_ids)
    tuning = perturbed(_some_vectors(parts), TUNING, seed=1)
    both = np.concatenate([tuning, held_out.vectors])
    truth = exact_neighbours(both, blocks_of(parts.paths, parts.removed), MEASURED)
    first = Neighbours(truth.similarity[:TUNING], truth.train_ids[:TUNING])
    rest = Neighbours(truth.similarity[TUNING:], truth.train_ids[TUNING:])
    assert about.target is not None
    settings = settings_for(searcher, tuning, first, about.target)
    recall = measure(searcher, held_out.vectors, rest, settings)
    return about.model_copy(
        update={
            "nprobe": settings.nprobe,
            "ef_search": settings.ef_search,
            "k_factor": settings.k_factor,
            "recall_at_10": recall.at_10,
            "recall_at_100": recall.at_100,
            "recall_queries": len(held_out.vectors),
            "recall_of": held_out.of,
        }
    )
