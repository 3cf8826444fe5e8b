"""The rows of an index of one's own that are nearest to queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from fastgda_core.search.own_index import OwnIndex, open_own_index
from tasks.artifact import Artifact
from tasks.config.inputs import CandidatesConfig
from tasks.context import Context
from tasks.inputs.features import extract_features, in_space, load_features
from tasks.inputs.index_rows import opened
from tasks.progress import stage

_AT_ONCE = 16  # queries


def index_space(context: Context) -> Context:
    """Return the context whose section `features` is what the index holds: the encoder's output, as it gives it."""
    space = context.config.candidates.space or context.config.features.space
    return in_space(context, space=space, centre=False, unit_length=False)


def open_near(config: CandidatesConfig) -> OwnIndex:
    """Map the index that names candidates, and compare it with its metadata.

    Raises:
        UsageError: it is no whole index, or its metadata has other rows.
    """
    folder = opened(config)
    assert config.index is not None
    index = open_own_index(folder.path, config.index.nprobe)
    if index.rows != folder.rows:
        raise UsageError(
            f"{folder.path} has {index.rows:,} vectors and the metadata beside it {folder.rows:,} rows: they are not "
            "of one index"
        )
    return index


def query_vectors(context: Context, queries: Artifact, width: int) -> NDArray[np.float32]:
    """Return the queries' vectors in the space of the index, (queries, width).

    Raises:
        UsageError: the encoders give another width.
    """
    near = index_space(context)
    extract_features.fn(near, queries)
    vectors: NDArray[np.float32] = load_features(near, queries, queries).numpy()
    if vectors.shape[1] != width:
        raise UsageError(
            f"candidates.index holds vectors of {width} numbers and {near.config.features.space} gives "
            f"{vectors.shape[1]}: name the encoder that the index was made with in candidates.space, and its weights "
            "in features.weights"
        )
    return vectors


def near_rows(
    context: Context, queries: Artifact, numbers: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.int64]]]:
    """Yield number, similarities and rows of the `candidates.k` nearest, nearest first, query by query.

    Raises:
        UsageError: the lists that a query looks at hold fewer than half as many.
    """
    config = context.config.candidates
    index, k = open_near(config), config.k or 0
    vectors = query_vectors(context, queries, index.width)
    with stage("nearest rows", len(numbers)) as advance:
        for start in range(0, len(numbers), _AT_ONCE):
            block = list(numbers[start : start + _AT_ONCE])
            for number, near, rows in zip(block, *index.nearest(vectors[block], k), strict=True):
                found = rows >= 0
                if 2 * int(found.sum()) < min(k, index.rows):
                    lists, of = index.lists(k)
                    raise UsageError(
                        f"candidates.index: the {lists:,} lists of {of:,} that a query looks at hold {found.sum():,} "
                        f"of {k:,} rows: raise candidates.index.nprobe"
                    )
                yield number, near[found], rows[found]
            advance(len(block))


def drawn_places(config: CandidatesConfig, number: int, count: int) -> NDArray[np.int64]:
    """Return which of a query's `count` nearest are scored, ascending: all, or `candidates.scored` drawn at random."""
    if config.scored is None or config.scored >= count:
        return np.arange(count)
    draw = np.random.default_rng([config.seed, number])
    return np.sort(draw.choice(count, config.scored, replace=False))
