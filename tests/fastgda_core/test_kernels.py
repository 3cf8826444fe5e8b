"""Kernels of features, held against dense matrices, a linear model trained again, and each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.teachers.kernels import DualKernel, Kernel, PrimalKernel

SAMPLES, SIZE, QUERIES = 40, 23, 5


def drawn(samples: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    scale = torch.linspace(0.1, 3, size, dtype=torch.float64)
    return tuple(torch.randn(n, size, generator=generator, dtype=torch.float64) * scale for n in (samples, QUERIES))  # type: ignore[return-value]


def blocks_of(features: Tensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter(features.split(7))


def by_tiles(features: Tensor, ridge: float) -> PrimalKernel:
    return PrimalKernel(blocks_of(features), features.shape[1], ridge, {})


def dense(features: Tensor, queries: Tensor, ridge: float) -> np.ndarray:
    """Scores by an inverse in NumPy, (queries, samples)."""
    phi, asked = features.numpy(), queries.numpy()
    return asked @ np.linalg.inv(phi.T @ phi + ridge * np.eye(phi.shape[1])) @ phi.T


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgda_core.teachers.kernels.TILE", 9)
    monkeypatch.setattr("fastgda_core.teachers.kernels._COLUMNS", 5)


@pytest.mark.parametrize("samples", [SAMPLES, 12])  # more and fewer than numbers
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
def test_both_forms_are_the_dense_inverse(samples: int, ridge: float) -> None:
    features, queries = drawn(samples, SIZE)
    expected = dense(features, queries, ridge)
    kernels: list[Kernel] = [DualKernel(features, ridge), by_tiles(features, ridge)]
    for kernel in kernels:
        found = kernel.of(queries) @ features.T
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9 * abs(expected).max())


def test_without_a_ridge_few_samples_have_the_pseudo_inverse() -> None:
    features, queries = drawn(12, SIZE)
    phi = features.numpy()
    expected = queries.numpy() @ np.linalg.pinv(phi.T @ phi, rcond=1e-10) @ phi.T
    np.testing.assert_allclose((DualKernel(features, 0.0).of(queries) @ features.T).numpy(), expected, rtol=1e-7)


def test_a_matrix_without_an_inverse_is_refused() -> None:
    features, _ = drawn(12, SIZE)
    with pytest.raises(UsageError, match=r"raise teacher\.ridge"):
        by_tiles(features, 0.0)


def test_a_query_has_the_same_scores_alone_and_among_others() -> None:
    features, queries = drawn(SAMPLES, SIZE)
    for kernel in (DualKernel(features, 1.0), by_tiles(features, 1.0)):
        together = kernel.of(queries)
        for number in range(QUERIES):
            torch.testing.assert_close(kernel.of(queries[number : number + 1])[0], together[number])


def test_single_precision_features_are_summed_in_double() -> None:
    features, queries = drawn(2000, SIZE)
    features += 100.0  # whose sums of squares single precision would round
    expected = dense(features.float().double(), queries.float().double(), 1.0)
    found = by_tiles(features.float(), 1.0).of(queries.float()) @ features.T
    assert np.abs(found.numpy() - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("form", [DualKernel, by_tiles])
def test_scores_of_a_linear_model_are_what_training_without_a_sample_gives(form: Callable[..., Kernel]) -> None:
    """With f(x) = <x, theta> by ridge regression, leaving sample i out moves f(q) by -s_i r_i / (1 - s_ii).

    s_i is TRAK's score of the gradients of f, without a projection, and s_ii that of the sample against itself; r_i is
    its residual (Sherman & Morrison, 1950; Cook, 1977).
    """
    features, queries = drawn(SAMPLES, SIZE)
    ridge, generator = 0.5, torch.Generator().manual_seed(4)
    target = features @ torch.randn(SIZE, generator=generator, dtype=torch.float64)
    target += torch.randn(SAMPLES, generator=generator, dtype=torch.float64)

    def trained(rows: Tensor) -> Tensor:
        matrix = features[rows].T @ features[rows] + ridge * torch.eye(SIZE, dtype=torch.float64)
        return torch.linalg.solve(matrix, features[rows].T @ target[rows])

    everyone = torch.arange(SAMPLES)
    theta = trained(everyone)
    kernel = form(features, ridge)
    scores, own = kernel.of(queries) @ features.T, (kernel.of(features) * features).sum(1)
    predicted = -scores * (target - features @ theta) / (1 - own)
    for sample in range(SAMPLES):
        moved = queries @ (trained(everyone[everyone != sample]) - theta)
        torch.testing.assert_close(moved, predicted[:, sample])
