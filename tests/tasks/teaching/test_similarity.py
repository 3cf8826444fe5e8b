"""The cheapest teacher from tars to published ranks, and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from fastgda_core.teachers.similarity import SimilarityTeacher
from storage_schemas import tables
from storage_schemas.snapshots.snapshots import read_ranks
from tasks.inputs.features import load_features
from tasks.inputs.queries import load_queries
from tests.tasks.whole_runs import SAMPLES, WholeRun


def test_scores_are_the_cosines_of_the_features(similar: WholeRun) -> None:
    run = similar.run
    samples, queries = run.artifacts["samples"], run.artifacts["queries"]
    phi = [load_features(similar.context, items, samples).numpy() for items in (queries, samples)]
    expected = cosine_similarity(*(vectors.astype(np.float64) for vectors in phi))
    names = [query.query_id for query in load_queries(queries)]
    found = read_ranks(similar.workspace, similar.curation.ranks.key, names).to_pylist()
    twins = {name for name in names if "-" in name}
    assert len(found) >= 10 * len(names) and len(found) <= 10 * len(names) + len(twins)
    for row in found:
        assert row["score"] == pytest.approx(expected[names.index(row["query_id"]), row["train_id"]], abs=1e-6)


def test_the_candidates_are_the_nearest_and_their_ranks_are_by_score(similar: WholeRun) -> None:
    run = similar.run
    chosen = tables.read(run.artifacts["candidates"].path, tables.CANDIDATES).to_pylist()
    ranked = read_ranks(similar.workspace, similar.curation.ranks.key, None).to_pylist()
    place = {(row["query_id"], row["train_id"]): row["rank"] for row in ranked}
    assert place.keys() == {(row["query_id"], row["train_id"]) for row in chosen}
    for row in chosen:
        if row["neighbor_rank"] <= 10:
            assert place[row["query_id"], row["train_id"]] == row["neighbor_rank"], "the same cosines"


def test_a_query_that_is_a_sample_finds_it_first(similar: WholeRun) -> None:
    ranked = read_ranks(similar.workspace, similar.curation.ranks.key, None).to_pylist()
    first = {row["query_id"]: row for row in ranked if row["rank"] == 1}
    for number in range(8):
        assert first[f"s{number:04d}"]["train_id"] == number
        assert first[f"s{number:04d}"]["score"] == pytest.approx(1.0)
    assert {row["train_id"] for row in ranked} <= set(range(SAMPLES))


def test_a_vector_without_a_length_is_like_nothing() -> None:
    import torch

    found = SimilarityTeacher().scores(torch.zeros(1, 3), torch.ones(2, 3))
    assert found.tolist() == [[0.0, 0.0]]
