from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgda_core.ranking.batches import RankPairs
from fastgda_core.ranking.subsets import random_priority, some_queries, thin

SAMPLES = 50


def keys(pairs: RankPairs) -> list[int]:
    return (pairs.query * SAMPLES + pairs.sample).tolist()


def some_pairs() -> tuple[RankPairs, dict[int, dict[int, float]]]:
    """Pairs with their scores, highest first in rank; every query has another number of candidates."""
    rng = np.random.default_rng(0)
    scores = {q: dict(zip(rng.permutation(SAMPLES)[: 10 + 5 * q], rng.random(50), strict=False)) for q in range(6)}
    rows = [
        (q, sample, rank / len(mine))
        for q, mine in scores.items()
        for rank, sample in enumerate(sorted(mine, key=lambda sample, mine=mine: -mine[sample]), start=1)
    ]
    query, sample, label = (torch.tensor(column) for column in zip(*rows, strict=True))
    return RankPairs.of(query, sample, label, queries=6, samples=SAMPLES), scores


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_the_highest_priorities_are_kept_and_ranked_anew(share: float) -> None:
    pairs, scores = some_pairs()
    priority = random_priority(pairs, seed=1)
    first = dict(zip(keys(pairs), priority.tolist(), strict=True))
    kept = thin(pairs, priority, share, torch.tensor([1, 4, 5]), ranked=True)
    found = dict(zip(keys(kept), kept.label.tolist(), strict=True))
    expected = {}
    for query in (1, 4, 5):
        mine = sorted(scores[query], key=lambda sample, query=query: -first[query * SAMPLES + sample])
        mine = mine[: max(1, int(np.ceil(share * len(mine))))]
        for rank, sample in enumerate(sorted(mine, key=lambda s, query=query: -scores[query][s]), start=1):
            expected[query * SAMPLES + sample] = pytest.approx(rank / len(mine))
    assert found == expected
    assert keys(kept) == sorted(keys(kept))


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_what_is_tied_at_the_last_rank_stays_there(share: float) -> None:
    """Of 40 candidates the last 25 are tied, of 10 all are, of 8 none."""
    untied = {0: 15, 1: 0, 2: 8}
    rows = [
        (query, sample, (sample + 1) / count if sample < untied[query] else 1.0)
        for query, count in enumerate((40, 10, 8))
        for sample in range(count)
    ]
    query, sample, label = (torch.tensor(column) for column in zip(*rows, strict=True))
    pairs = RankPairs.of(query, sample, label, queries=3, samples=SAMPLES)
    kept = thin(pairs, random_priority(pairs, seed=2), share, ranked=True)
    for number in range(3):
        mine = kept.query == number
        expected = [
            pytest.approx((place + 1) / int(mine.sum())) if sample < untied[number] else 1.0
            for place, sample in enumerate(kept.sample[mine].tolist())
        ]
        assert kept.label[mine].tolist() == expected


def test_scores_are_not_ranked_anew() -> None:
    pairs, _ = some_pairs()
    kept = thin(pairs, random_priority(pairs, 1), 0.5, ranked=False)
    before = dict(zip(keys(pairs), pairs.label.tolist(), strict=True))
    assert all(before[key] == label for key, label in zip(keys(kept), kept.label.tolist(), strict=True))


def test_a_share_of_the_queries_is_drawn() -> None:
    queries = torch.arange(100, 140)
    drawn = some_queries(queries, 0.25, seed=3)
    assert len(set(drawn.tolist())) == 10 and set(drawn.tolist()) <= set(queries.tolist())
    assert torch.equal(drawn, some_queries(queries, 0.25, seed=3))
    assert not torch.equal(drawn, some_queries(queries, 0.25, seed=4))
    assert len(some_queries(queries, 0.001, seed=0)) == 1
