from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgda_core.evaluation import candidates
from fastgda_core.evaluation.candidates import CandidateScores
from fastgda_core.evaluation.ranking_metrics import average_precision, descending_ranks, top_mask

QUERIES, SAMPLES = 7, 90


@pytest.fixture
def dense() -> Tensor:
    """Scores, (queries, samples), minus infinity where a sample is no candidate; the fourth query has none."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(QUERIES, SAMPLES, generator=generator, dtype=torch.float64)
    outside = torch.rand(QUERIES, SAMPLES, generator=generator) < torch.linspace(0.1, 0.9, QUERIES)[:, None]
    outside[3] = True
    return scores.masked_fill(outside, -torch.inf)


def sparse(dense: Tensor) -> CandidateScores:
    """The same, from pairs in no order."""
    query, train_id = dense.isfinite().nonzero(as_tuple=True)
    mixed = torch.randperm(len(query), generator=torch.Generator().manual_seed(1))
    query, train_id = query[mixed], train_id[mixed]
    return CandidateScores.of(query, train_id, dense[query, train_id], queries=len(dense))


def test_scores_of_pairs_are_those_of_the_matrix(dense: Tensor) -> None:
    found = sparse(dense)
    for row in range(QUERIES):
        train_ids = dense[row].isfinite().nonzero().squeeze(1)
        assert torch.equal(found.train_ids[row, found.known[row]], train_ids.int())
        assert torch.equal(found.scores[row, found.known[row]], dense[row, train_ids])
        assert (found.scores[row, ~found.known[row]] == -torch.inf).all()
    assert torch.equal(found.members, dense.isfinite().any(0).nonzero().squeeze(1).int())


@pytest.mark.parametrize("block", [1, 7, 16_384])
def test_cosines_and_metrics_are_those_of_the_matrix(
    dense: Tensor, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "BLOCK_ROWS", block)
    generator = np.random.default_rng(0)
    queries, samples = (generator.standard_normal((count, 5)) for count in (QUERIES, SAMPLES))
    encoded: list[int] = []

    def encode(rows: Tensor) -> Tensor:
        encoded.extend(rows.tolist())
        return torch.from_numpy(samples).float()[rows]

    found = sparse(dense)
    cosines = found.cosines(torch.from_numpy(queries).float(), encode)
    truth = queries @ samples.T
    for row in range(QUERIES):
        expected = truth[row, dense[row].isfinite().numpy()]
        np.testing.assert_allclose(cosines[row, found.known[row]], expected, rtol=1e-5, atol=1e-6)
    assert (cosines[~found.known] == -torch.inf).all()
    assert sorted(encoded) == found.members.tolist()  # each once, and nothing else
    some = [row for row in range(QUERIES) if row != 3]
    whole = torch.from_numpy(truth).masked_fill(~dense.isfinite(), -torch.inf)
    relevant, expected_relevant = top_mask(found.scores[some], 5), top_mask(dense[some], 5)
    precision = average_precision(cosines[some], relevant)
    np.testing.assert_allclose(precision, average_precision(whole[some], expected_relevant), rtol=1e-12)
    ranks = descending_ranks(found.scores[some])[found.known[some]]
    assert torch.equal(ranks, descending_ranks(dense[some])[dense[some].isfinite()])
