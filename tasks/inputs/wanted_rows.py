"""The rows of an index of one's own that a run would score: which are there, which are to be fetched, how surely found.

Nothing of this needs the training images: queries and the index are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from fastgda_core.search.own_index import OwnIndex, exact_rows
from storage_schemas.clip_index import embedding_blocks
from tasks.artifact import Artifact
from tasks.config.inputs import CandidatesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, open_context
from tasks.inputs.index_rows import join_rows, map_rows, opened
from tasks.inputs.near_rows import drawn_places, near_rows, open_near, query_vectors
from tasks.inputs.queries import make_queries
from tasks.inputs.samples import ingest_samples
from tasks.inputs.tars import matching_files
from tasks.progress import stage


@dataclass(frozen=True, eq=False)
class Asked:
    """An index with those who ask it.

    rows: the training sample of each row, (rows,), -1 where there is none; None: data.shards matches no file.
    """

    context: Context
    queries: Artifact
    index: OwnIndex
    rows: NDArray[np.int64] | None


def ask_index(config: PipelineConfig) -> Asked:
    """Open the index and make the queries; those of the twin test only where training images are there.

    Raises:
        UsageError: the configuration names no index, or it is none of this encoder.
    """
    if config.candidates.index is None:
        raise UsageError("the configuration has no candidates.index: this command asks one")
    index, there = open_near(config.candidates), bool(matching_files(config.data.shards))
    if not there:
        config = config.model_copy(update={"queries": config.queries.model_copy(update={"twins": 0})})
    context = open_context(config, model=bool(config.queries.captions or config.queries.twins))
    samples = ingest_samples.fn(context).artifact if there else Artifact("samples", "", context.workspace.root, 0)
    queries = make_queries.fn(context, samples).artifact
    query_vectors(context, queries, index.width)
    return Asked(context, queries, index, map_rows(join_rows(context, samples)) if there else None)


@dataclass(frozen=True)
class Listed:
    """Counts of a list: the pairs of queries and rows, the rows that these are, those there already, those written."""

    pairs: int
    rows: int
    there: int
    written: int


def list_rows(asked: Asked, path: Path) -> Listed:
    """Write the rows that any query is to be scored against and whose images are not there, as img2dataset takes them.

    Of the queries' nearest these are the ones drawn by `candidates.scored`, and the random rows of `candidates.check`.
    A byte is held for each row of the index.
    """
    config = asked.context.config.candidates
    wanted, pairs = np.zeros(asked.index.rows, bool), 0
    for number, _, rows in near_rows(asked.context, asked.queries, range(asked.queries.rows)):
        drawn = rows[drawn_places(config, number, len(rows))]
        wanted[drawn] = True
        pairs += len(drawn)
    wanted[random_rows(config, asked.index.rows)] = True
    distinct = int(wanted.sum())
    if asked.rows is not None:
        wanted &= asked.rows < 0
    written = opened(config).write_list(path, wanted)
    return Listed(pairs, distinct, distinct - written, written)


def random_rows(config: CandidatesConfig, total: int) -> NDArray[np.int64]:
    """Return the rows that `candidates.check` scores beside the candidates, the same for all queries, ascending."""
    if config.check is None or config.check.random is None:
        return np.empty(0, np.int64)
    draw = np.random.default_rng([config.seed, total, config.check.random])
    return np.sort(draw.choice(total, min(total, config.check.random), replace=False))


def search_recall(asked: Asked, embeddings: Path, count: int) -> tuple[float, int]:
    """Return the mean share of a query's true `candidates.k` nearest that the index finds, and over how many queries.

    Args:
        embeddings: folder of the .npy files that the index was made of; every vector in it is read once.
        count: of queries, evenly spread.

    Raises:
        UsageError: there are other numbers of embeddings than rows.
    """
    numbers = np.unique(np.linspace(0, asked.queries.rows - 1, count).round().astype(int)).tolist()
    config, read = asked.context.config.candidates, 0
    vectors = query_vectors(asked.context, asked.queries, asked.index.width)[numbers]
    k = min(config.k or 0, asked.index.rows)
    with stage("embeddings", asked.index.rows) as advance:

        def counted() -> Iterator[NDArray[np.float32]]:
            nonlocal read
            for block in embedding_blocks(embeddings):
                yield block
                read += len(block)
                advance(len(block))

        truth = exact_rows(counted(), vectors, k, cosine=asked.index.is_cosine)
    if read != asked.index.rows:
        raise UsageError(
            f"{embeddings} holds {read:,} vectors and the index {asked.index.rows:,}: it is of another one"
        )
    found = (rows for _, _, rows in near_rows(asked.context, asked.queries, numbers))
    shares = [len(np.intersect1d(mine, true)) / k for mine, true in zip(found, truth, strict=True)]
    return float(np.mean(shares)), len(shares)
