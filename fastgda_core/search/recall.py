"""Recall of an index against exact search over the same vectors, and the settings that reach it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastgda_core.search.build import Vectors, faiss
from fastgda_core.search.searcher import Searcher, SearchSettings

TIES = 32  # further neighbours that are kept: any of several that are equally near counts as found
ROUNDING = 1e-6  # of a similarity: as near as the k-th
NOISE = 0.5  # length of what is added to a vector that stands for a query, in its own length
FAR_ENOUGH = 0.001  # gain of recall by twice the work below which more work is in vain
GRAPH_LADDER = (16, 32, 64, 128, 256, 512, 1024)
FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0)


class Neighbours(NamedTuple):
    """Similarities and train_ids of the nearest vectors, best first, (queries, n) each."""

    similarity: Vectors
    train_ids: NDArray[np.int64]


class Recall(NamedTuple):
    """The mean share of the true first 10 and 100 that an index finds among its first 10 and 100."""

    at_10: float
    at_100: float


def exact_neighbours(queries: Vectors, blocks: Iterable[tuple[NDArray[np.int64], Vectors]], k: int) -> Neighbours:
    """Compare queries, (q, width), with every vector, block by block: (train_ids, (n, width)), in bounded memory.

    A few more than k are returned where there are, so that `recall` knows ties.
    """
    asked = torch.from_numpy(np.ascontiguousarray(queries))
    similarity, train_ids = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for ids, vectors in blocks:
        found, rows = (asked @ torch.from_numpy(vectors).T).topk(min(k + TIES, len(ids)), dim=1)
        similarity = torch.cat([similarity, found], dim=1)
        train_ids = torch.cat([train_ids, torch.from_numpy(ids)[rows]], dim=1)
        similarity, order = similarity.topk(min(k + TIES, similarity.shape[1]), dim=1)
        train_ids = train_ids.gather(1, order)
    return Neighbours(similarity.numpy(), train_ids.numpy())


def recall(found: NDArray[np.int64], truth: Neighbours, k: int) -> float:
    """Return the share of the k nearest vectors among found train_ids, (queries, >= k), mean over queries.

    A vector that is as near as the k-th nearest counts as one of them.
    """
    return float(_shares(found, truth, k).mean())


def _shares(found: NDArray[np.int64], truth: Neighbours, k: int) -> NDArray[np.float64]:
    """Return the share of each query, (queries,)."""
    k = min(k, truth.train_ids.shape[1])
    if k == 0:
        return np.ones(len(found))
    shares = []
    for mine, similarity, ids in zip(found, *truth, strict=True):
        last = similarity[k - 1]
        right = ids[similarity >= last - ROUNDING * abs(last)]
        shares.append(min(k, np.isin(mine[:k], right).sum()) / k)
    return np.array(shares)


def measure(searcher: Searcher, queries: Vectors, truth: Neighbours, settings: SearchSettings | None = None) -> Recall:
    """Measure recall at 10 and at 100 of some queries, whose exact neighbours are known."""
    _, found = searcher.search(queries, 100, settings=settings)
    return Recall(recall(found, truth, 10), recall(found, truth, 100))


def perturbed(vectors: Vectors, count: int, seed: int) -> Vectors:
    """Return vectors that stand for queries, (count, width): some of these with normal noise of half their length."""
    rng = np.random.default_rng(seed)
    chosen = vectors[rng.integers(0, len(vectors), count)]
    noise = rng.standard_normal(chosen.shape).astype(np.float32)
    noise *= NOISE * np.linalg.norm(chosen, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    both = chosen + noise
    length = np.linalg.norm(chosen, axis=1, keepdims=True) / np.maximum(
        np.linalg.norm(both, axis=1, keepdims=True), 1e-12
    )
    return np.asarray(both * length, dtype=np.float32)


def settings_for(searcher: Searcher, queries: Vectors, truth: Neighbours, target: float) -> SearchSettings:
    """Choose the cheapest settings by which a kind of index reaches a recall at 100; the best where none does.

    It is reached where the mean over these queries is a standard error above it: others are asked later.
    """
    index = searcher.index
    refined = isinstance(index, faiss.IndexRefine)
    base = faiss.downcast_index(index.base_index) if refined else index
    lists = faiss.try_extract_index_ivf(base)
    factor = FACTORS[-1] if refined else None
    if lists is not None:
        ladder = [SearchSettings(nprobe=1 << step, k_factor=factor) for step in range(lists.nlist.bit_length())]
    elif isinstance(base, faiss.IndexHNSW):
        ladder = [SearchSettings(ef_search=nodes, k_factor=factor) for nodes in GRAPH_LADDER]
    else:
        ladder = [SearchSettings(k_factor=factor)]
    chosen, reached = _climb(searcher, queries, truth, target, ladder)
    if not refined:
        return chosen
    factors = [replace(chosen, k_factor=factor) for factor in FACTORS]
    return _climb(searcher, queries, truth, min(target, reached - FAR_ENOUGH), factors)[0]


def _climb(
    searcher: Searcher, queries: Vectors, truth: Neighbours, target: float, ladder: Sequence[SearchSettings]
) -> tuple[SearchSettings, float]:
    """Return the first rung that reaches the target, or the one after which two more gain nothing, and its recall."""
    best, value, in_vain = ladder[0], -1.0, 0
    for rung in ladder:
        shares = _shares(searcher.search(queries, 100, settings=rung)[1], truth, 100)
        found = float(shares.mean())
        if found > value + FAR_ENOUGH:
            best, value, in_vain = rung, found, 0
        else:
            in_vain += 1
        if found - shares.std() / len(shares) ** 0.5 >= target or in_vain == 2:
            break
    return best, value
