from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from storage_schemas import tables
from tasks.config.inputs import CandidatesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs.candidates import _chosen, candidate_space, choose_candidates
from tasks.inputs.features import extract_features
from tasks.inputs.queries import make_queries
from tasks.inputs.samples import ingest_samples
from tests import tiny
from tests.tasks.configs import document

SAMPLES, QUERIES = 40, 6


@pytest.fixture
def vectors() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors of queries and samples."""
    draw = np.random.default_rng(0)
    made = (draw.normal(size=(count, 5)).astype(np.float32) for count in (QUERIES, SAMPLES))
    queries, samples = (vector / np.linalg.norm(vector, axis=1, keepdims=True) for vector in made)
    return queries, samples


def chosen(
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]], twins: dict[int, int] | None = None, **config: object
) -> list[NDArray[np.int64]]:
    """The candidates of each query, whose neighbour ranks and similarities are checked by the way."""
    queries, samples = vectors
    wanted = [(twins or {}).get(number) for number in range(len(queries))]
    cosines = queries.astype(np.float64) @ samples.T
    found = []
    settings = CandidatesConfig.model_validate(config)
    for number, train_ids, ranks, similarity in _chosen(settings, queries, samples, wanted):
        assert number == len(found)
        nearer = (cosines[number][None] > cosines[number][train_ids, None]).sum(1)
        np.testing.assert_array_equal(ranks[train_ids], nearer + 1)
        np.testing.assert_allclose(similarity[train_ids], cosines[number][train_ids], atol=1e-6)
        assert (np.diff(ranks[train_ids]) > 0).all()
        found.append(train_ids)
    return found


def nearest(vectors: tuple[NDArray[np.float32], NDArray[np.float32]], k: int) -> list[set[int]]:
    queries, samples = vectors
    return [set(np.argsort(-(samples @ query))[:k].tolist()) for query in queries]


def test_all_samples_are_candidates(vectors: tuple[NDArray[np.float32], NDArray[np.float32]]) -> None:
    assert all(set(mine.tolist()) == set(range(SAMPLES)) for mine in chosen(vectors, policy="all"))


def test_top_k_are_the_nearest(vectors: tuple[NDArray[np.float32], NDArray[np.float32]]) -> None:
    assert [set(mine.tolist()) for mine in chosen(vectors, policy="top_k", k=7)] == nearest(vectors, 7)


def test_pooled_are_the_nearest_of_any_query_for_every_query(
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> None:
    pool = set.union(*nearest(vectors, 4))
    assert len(pool) > 4
    assert all(set(mine.tolist()) == pool for mine in chosen(vectors, policy="pooled", k=4))


def test_m_of_k_are_drawn_for_each_query_by_itself(vectors: tuple[NDArray[np.float32], NDArray[np.float32]]) -> None:
    mine = chosen(vectors, policy="top_k", k=20, scored=5, seed=1)
    for train_ids, near in zip(mine, nearest(vectors, 20), strict=True):
        assert len(set(train_ids.tolist())) == 5
        assert set(train_ids.tolist()) <= near
    again = chosen(vectors, policy="top_k", k=20, scored=5, seed=1)
    other = chosen(vectors, policy="top_k", k=20, scored=5, seed=2)
    assert all(np.array_equal(first, second) for first, second in zip(mine, again, strict=True))
    assert any(set(first.tolist()) != set(second.tolist()) for first, second in zip(mine, other, strict=True))
    # The draw of a query does not depend on which others there are.
    alone = chosen((vectors[0][:3], vectors[1]), policy="top_k", k=20, scored=5, seed=1)
    assert all(np.array_equal(first, second) for first, second in zip(alone, mine, strict=False))
    # Over queries every place among the k is drawn now and then: not always the nearest.
    places = np.concatenate([chosen(vectors, policy="top_k", k=20, scored=5, seed=seed)[0] for seed in range(30)])
    assert len(set(places.tolist())) == 20


@pytest.mark.parametrize("config", [{"policy": "top_k", "k": 7}, {"policy": "top_k", "k": 20, "scored": 5}])
def test_a_twin_is_scored_however_far_it_is(
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]], config: dict[str, object]
) -> None:
    without = chosen(vectors, **config)
    queries, samples = vectors
    far, near = int(np.argmin(samples @ queries[4])), int(without[5][0])
    found = chosen(vectors, twins={4: far, 5: near}, **config)
    assert found[4].tolist() == [*without[4].tolist(), far]
    assert all(np.array_equal(mine, before) for mine, before in zip(found, without, strict=True) if mine[-1] != far)


def test_queries_of_the_twin_test_do_not_widen_the_pool(
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> None:
    pool = set.union(*nearest(vectors, 4)[:5])
    far = next(number for number in range(SAMPLES) if number not in pool)
    found = chosen(vectors, twins={5: far}, policy="pooled", k=4)
    assert [set(mine.tolist()) for mine in found] == [*[pool] * 5, pool | {far}]


def test_candidates_are_near_in_a_space_of_their_own(tmp_path: Path, model_folder: Path) -> None:
    """No feature of the head's space is there, whose weights this machine does not have."""
    shapes, queries_tar = tmp_path / "shapes.tar", tmp_path / "queries.tar"
    tiny.write_tar(shapes, tiny.sample_members(range(12)))
    tiny.write_tar(queries_tar, tiny.sample_members(range(4)))
    changes = document(
        workspace=str(tmp_path / "workspace"),
        data__shards=str(shapes),
        model__folder=str(model_folder),
        queries={"shards": str(queries_tar), "split": {"train": 2, "validation": 1, "test": 1}, "twins": 0},
        features={"space": "dinov2"},
        candidates={"policy": "top_k", "k": 3, "space": "pixel"},
    )
    context = Context(PipelineConfig.model_validate(changes), "m")
    samples = ingest_samples.fn(context).artifact
    queries = make_queries.fn(context, samples).artifact
    for items in (samples, queries):
        extract_features.fn(candidate_space(context), items)
    chosen = choose_candidates.fn(context, "run-1", samples, queries).artifact
    nearest = tables.read(chosen.path, tables.CANDIDATES).to_pylist()
    assert len(nearest) == 3 * 4
    first = [row for row in nearest if row["neighbor_rank"] == 1]
    assert [row["similarity"] for row in first] == pytest.approx([1.0] * 4), "each query is a sample, too"
