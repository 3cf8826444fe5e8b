"""Ensembles: sums of methods that the validation queries chose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fastgda_core.evaluation.ensembles import chosen_members, ensemble_sum

MODELS, SAMPLES, QUERIES = 12, 20, 6


@pytest.fixture
def world() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Losses that are sums of true influences, and methods that know these on some of the queries."""
    draw = torch.Generator().manual_seed(0)
    kept = torch.rand(MODELS, SAMPLES, generator=draw) < 0.5
    truth, noise = (torch.randn(QUERIES, SAMPLES, generator=draw, dtype=torch.float64) for _ in range(2))
    first = torch.arange(QUERIES)[:, None] < 3
    methods = {
        "late": torch.where(first, noise, truth),
        "half": truth + noise,
        "early": torch.where(first, truth, noise),
        "blind": noise,
    }
    return kept, -(kept.double() @ truth.T), methods


def test_members_are_best_on_the_validation_queries_whatever_they_are_on_others(
    world: tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    kept, losses, methods = world
    for validation, best in (([0, 1, 2], "early"), ([3, 4, 5], "late")):
        judged = {
            name: np.mean(
                [stats.spearmanr((kept.double() @ each[row]), -losses[:, row]).statistic for row in validation]
            )
            for name, each in methods.items()
        }
        order = sorted(judged, key=lambda name: -judged[name])
        found = chosen_members(methods, kept, losses, validation)
        assert found == {
            f"best 2: {order[0]}; {order[1]}": order[:2],
            f"best 3: {order[0]}; {order[1]}; {order[2]}": order[:3],
        }
        assert order[0] == best
        others = [row for row in range(QUERIES) if row not in validation]
        changed = losses.clone()
        changed[:, others] = torch.randn(MODELS, len(others), dtype=torch.float64)
        assert chosen_members(methods, kept, changed, validation) == found
    assert chosen_members(methods, kept, losses, []) == {}


def test_a_sum_weighs_members_alike_query_by_query() -> None:
    first = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    second = torch.tensor([[100.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    expected = first[0].numpy() / first[0].numpy().std() + second[0].numpy() / second[0].numpy().std()
    found = ensemble_sum([first, second])
    assert np.allclose(found[0].numpy(), expected)
    assert np.allclose(found[1].numpy(), second[1].numpy() / second[1].numpy().std()), "what is all alike says nothing"
    assert torch.allclose(ensemble_sum([first * 7, second]), found)
