"""Random projections of gradients, held against dense matrices and against what is claimed of their error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgda_core.sketches.projection import Projection

CPU = torch.device("cpu")
WEIGHTS = {"first": 700, "second": 44, "third": 1256}
COUNT = sum(WEIGHTS.values())


def drawn(size: int, seed: int = 0) -> Projection:
    return Projection.drawn(WEIGHTS, size, seed, CPU)


def by_layer(gradients: Tensor) -> list[tuple[str, Tensor]]:
    return list(zip(WEIGHTS, gradients.split(list(WEIGHTS.values()), dim=1), strict=True))


def dense(projection: Projection) -> Tensor:
    """The matrix (size, weights), by projecting the unit vectors."""
    return projection.of(by_layer(torch.eye(COUNT))).T


def test_a_projection_is_a_matrix_with_one_sign_a_weight_and_groups_of_one_size() -> None:
    projection = drawn(64)
    matrix = dense(projection)
    assert matrix.shape == (64, COUNT) and (matrix.abs().sum(0) == 1).all()
    groups = matrix.abs().sum(1)
    assert groups.min() >= COUNT // 64 and groups.max() <= -(-COUNT // 64)
    assert 0.4 < (matrix.sum(0) > 0).double().mean() < 0.6
    gradients = torch.randn(5, COUNT)
    torch.testing.assert_close(projection.of(by_layer(gradients)), gradients @ matrix.T)


def test_nothing_is_lost_where_there_are_no_more_weights_than_numbers() -> None:
    projection, gradients = drawn(4096), torch.randn(3, COUNT)
    found = projection.of(by_layer(gradients))
    assert projection.size == COUNT
    torch.testing.assert_close(found @ found.T, gradients @ gradients.T)
    assert torch.equal(found.abs().sort(1).values, gradients.abs().sort(1).values)


@pytest.mark.parametrize("alike", [0.0, 0.7, 1.0])
def test_inner_products_are_right_on_average_and_err_no_more_than_is_said(alike: float) -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(COUNT, generator=generator).pow(4)  # a few large entries, as gradients have
    x = torch.randn(COUNT, generator=generator) * scale
    y = alike * x + (1 - alike) * torch.randn(COUNT, generator=generator) * scale
    size, seeds = 128, 400
    both = [drawn(size, seed).of(by_layer(torch.stack([x, y]))) for seed in range(seeds)]
    found = torch.stack([each[0] @ each[1] for each in both]).double()
    said = float(((x @ x) * (y @ y) + (x @ y) ** 2).div(size).sqrt())
    assert abs(found.mean() - x @ y) < 4 * said / seeds**0.5
    error = (found - x @ y).square().mean().sqrt()
    assert 0.5 * said < error < 1.1 * said  # 400 draws tell a standard deviation to 4 %


def test_a_seed_names_one_projection_and_other_seeds_others() -> None:
    assert torch.equal(dense(drawn(64, 3)), dense(drawn(64, 3)))
    assert not torch.equal(dense(drawn(64, 3)), dense(drawn(64, 4)))


def test_random_words_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dense(drawn(64))
    monkeypatch.setattr("fastgda_core.sketches.projection._AT_ONCE", 11)
    assert torch.equal(dense(drawn(64)), whole)


def test_a_projected_gradient_is_the_same_alone_and_in_any_batch() -> None:
    projection, gradients = drawn(64), torch.randn(6, COUNT)
    whole = projection.of(by_layer(gradients))
    for row in range(6):
        assert torch.equal(projection.of(by_layer(gradients[row : row + 1]))[0], whole[row])
