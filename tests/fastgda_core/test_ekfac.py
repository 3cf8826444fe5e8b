from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastgda_core.curvature.ekfac import EkfacFisher, LayerFactors, fit_ekfac, load_ekfac

D_IN, D_OUT = 4, 3
CPU = torch.device("cpu")


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(D_IN, D_OUT, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.projection(inputs)


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().sum()


@pytest.fixture(scope="module")
def layer() -> OneLayer:
    torch.manual_seed(0)
    return OneLayer()


@pytest.fixture(scope="module", params=[1, 7], ids=["one token", "many tokens"])
def fitted(request: pytest.FixtureRequest, layer: OneLayer) -> tuple[Tensor, Tensor, EkfacFisher]:
    """Inputs, targets and the Fisher fitted to them."""
    inputs, targets = uneven_data(request.param)
    return inputs, targets, fit(layer, inputs, targets)


def fit(layer: OneLayer, inputs: Tensor, targets: Tensor) -> EkfacFisher:
    return fit_ekfac(layer, ["projection"], TensorDataset(inputs, targets), squared_error, 16, CPU)


def uneven_data(tokens: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Inputs and targets whose covariances have well separated eigenvalues, and which depend on each other."""
    generator = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(count, tokens, D_IN, generator=generator) * torch.tensor([3.0, 1.5, 0.8, 0.3])
    inputs = inputs @ torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator)).Q
    targets = torch.randn(count, tokens, D_OUT, generator=generator) * torch.tensor([2.0, 1.0, 0.4])
    return inputs, targets + inputs[..., :D_OUT].abs()


def closed_form_gradients(layer: OneLayer, inputs: Tensor, targets: Tensor) -> tuple[np.ndarray, ...]:
    """a, g = 2 (W a - y) of each token, and G = sum over tokens of g a^T, in float64."""
    a, y = inputs.double().numpy(), targets.double().numpy()
    g = 2 * (a @ layer.projection.weight.detach().double().numpy().T - y)
    return a, g, np.einsum("nto,nti->noi", g, a)


def dense(fisher: EkfacFisher) -> np.ndarray:
    """U (diag Lambda) U^T over row-major vec(G), (d_out d_in, d_out d_in)."""
    factors = fisher.layers["projection"]
    basis = np.kron(factors.output_basis.double().numpy(), factors.input_basis.double().numpy())
    return basis * factors.eigenvalues.double().numpy().ravel() @ basis.T


def test_eigenvalues_are_the_mean_squared_gradient_in_the_eigenbasis(
    layer: OneLayer, fitted: tuple[Tensor, Tensor, EkfacFisher]
) -> None:
    inputs, targets, fisher = fitted
    a, g, gradients = closed_form_gradients(layer, inputs, targets)
    input_basis = np.linalg.eigh(np.einsum("nti,ntj->ij", a, a) / len(a)).eigenvectors
    output_basis = np.linalg.eigh(np.einsum("nto,ntp->op", g, g) / len(g)).eigenvectors
    expected = ((output_basis.T @ gradients @ input_basis) ** 2).mean(0)

    # Each basis may come in its own order and with its own signs: match columns before comparing.
    factors = fisher.layers["projection"]
    input_match = np.abs(input_basis.T @ factors.input_basis.double().numpy())
    output_match = np.abs(output_basis.T @ factors.output_basis.double().numpy())
    columns, rows = input_match.argmax(0), output_match.argmax(0)
    np.testing.assert_allclose(input_match.max(0), 1, atol=1e-5)
    np.testing.assert_allclose(output_match.max(0), 1, atol=1e-5)
    assert sorted(columns) == list(range(D_IN))
    assert sorted(rows) == list(range(D_OUT))
    np.testing.assert_allclose(factors.eigenvalues.numpy(), expected[np.ix_(rows, columns)], rtol=1e-3)


def test_fit_does_not_depend_on_the_batch_size_and_leaves_the_model_alone(layer: OneLayer) -> None:
    inputs, targets = uneven_data(7)
    before = layer.projection.weight.detach().clone()
    # 60 samples do not divide into batches of 16 or of 7.
    whole = fit(layer, inputs, targets)
    parts = fit_ekfac(layer, ["projection"], TensorDataset(inputs, targets), squared_error, 7, CPU)
    np.testing.assert_allclose(dense(parts), dense(whole), atol=1e-4 * np.abs(dense(whole)).max())
    assert torch.equal(layer.projection.weight, before)
    assert type(layer.projection) is nn.Linear


def test_solve_equals_a_dense_solve_with_damping_of_a_tenth_of_the_mean_eigenvalue(
    fitted: tuple[Tensor, Tensor, EkfacFisher],
) -> None:
    fisher = fitted[2]
    matrix = dense(fisher)
    damping = 0.1 * np.trace(matrix) / len(matrix)
    gradient = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(4))
    expected = np.linalg.solve(matrix + damping * np.eye(len(matrix)), gradient.double().numpy().ravel())
    found = fisher.solve("projection", gradient).numpy().ravel()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_equals_the_dense_fisher_where_gradients_and_inputs_are_independent(layer: OneLayer) -> None:
    """Every input meets every output gradient, so E[vec(G) vec(G)^T] is B kron A exactly."""
    rng = np.random.default_rng(5)
    inputs = np.repeat(rng.normal(size=(24, D_IN)) * [3.0, 1.5, 0.8, 0.3], 24, axis=0)
    output_gradients = np.tile(rng.normal(size=(24, D_OUT)) * [2.0, 1.0, 0.4] + 0.5, (24, 1))
    weight = layer.projection.weight.detach().double().numpy()
    # g = 2 (W a - y), so this y gives the gradient that was asked for.
    targets = inputs @ weight.T - output_gradients / 2
    gradients = np.einsum("no,ni->noi", output_gradients, inputs).reshape(len(inputs), -1)
    exact = gradients.T @ gradients / len(gradients)

    found = dense(fit(layer, *(torch.from_numpy(part).float()[:, None] for part in (inputs, targets))))

    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-4


def test_keeps_the_dense_fisher_diagonal_in_its_eigenbasis_where_they_depend(
    layer: OneLayer, fitted: tuple[Tensor, Tensor, EkfacFisher]
) -> None:
    """The correction that EK-FAC makes to K-FAC: exact on the diagonal, hence also in the trace."""
    inputs, targets, fisher = fitted
    gradients = closed_form_gradients(layer, inputs, targets)[2].reshape(len(inputs), -1)
    exact = gradients.T @ gradients / len(gradients)
    factors = fisher.layers["projection"]
    basis = np.kron(factors.output_basis.double().numpy(), factors.input_basis.double().numpy())
    np.testing.assert_allclose(np.diag(basis.T @ exact @ basis), factors.eigenvalues.numpy().ravel(), rtol=1e-3)
    assert np.trace(dense(fisher)) == pytest.approx(np.trace(exact), rel=1e-4)


def test_comes_back_from_disk_as_it_was(fitted: tuple[Tensor, Tensor, EkfacFisher], tmp_path: Path) -> None:
    key = fitted[2].layers["projection"]
    value = LayerFactors(key.input_basis.T, key.output_basis.T, key.eigenvalues + 1)
    fisher = EkfacFisher({"down.0.attn2.to_k": key, "up.1.attn2.to_v": value})
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = load_ekfac(tmp_path / "fisher.safetensors")
    assert loaded.layers.keys() == fisher.layers.keys()
    for name, factors in fisher.layers.items():
        assert torch.equal(loaded.layers[name].input_basis, factors.input_basis)
        assert torch.equal(loaded.layers[name].output_basis, factors.output_basis)
        assert torch.equal(loaded.layers[name].eigenvalues, factors.eigenvalues)
