from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import (
    DiagonalFisher,
    EkfacFisher,
    Fisher,
    FisherKind,
    LayerFactors,
    fit_fisher,
    load_fisher,
)
from fastgda_core.errors import UsageError

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
    fisher = fit_fisher("ekfac", layer, ["projection"], TensorDataset(inputs, targets), squared_error, 16, CPU)
    assert isinstance(fisher, EkfacFisher)
    return fisher


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


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_fit_does_not_depend_on_the_batch_size_and_leaves_the_model_alone(layer: OneLayer, kind: FisherKind) -> None:
    data = TensorDataset(*uneven_data(7))
    before = layer.projection.weight.detach().clone()
    # 60 samples do not divide into batches of 16 or of 7.
    whole, parts = (fit_fisher(kind, layer, ["projection"], data, squared_error, size, CPU) for size in (16, 7))
    gradient = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(4))
    expected = whole.solve("projection", gradient)
    torch.testing.assert_close(parts.solve("projection", gradient), expected, rtol=0, atol=1e-4 * expected.norm())
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

    fisher = fit(layer, *(torch.from_numpy(part).float()[:, None] for part in (inputs, targets)))

    found = dense(fisher)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-4
    factors = fisher.layers["projection"]
    basis = np.kron(factors.output_basis.double().numpy(), factors.input_basis.double().numpy())
    rotated = basis.T @ exact @ basis
    assert np.linalg.norm(rotated - np.diag(np.diag(rotated))) <= 1e-4 * np.linalg.norm(rotated)


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


CASES = {
    "one token": (nn.Linear(4, 3, bias=False), (1, 4)),
    "many tokens and bias": (nn.Linear(4, 3), (7, 4)),
    "convolution with bias": (nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 0)), (2, 4, 5)),
}


class Case:
    """A layer, data for it, and what follows from per-sample gradients in float64."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(6)
        torch.manual_seed(0)
        layer.reset_parameters()
        self.model = nn.Sequential(layer)
        scale = torch.linspace(0.5, 2, shape[0] if len(shape) > 2 else shape[-1])
        self.inputs = torch.randn(48, *shape, generator=generator)
        self.inputs *= scale[:, None, None] if len(shape) > 2 else scale
        output = layer(self.inputs).detach()
        self.targets = torch.randn(output.shape, generator=generator) + output.abs()
        self.dataset = TensorDataset(self.inputs, self.targets)
        self.fitted: dict[FisherKind, Fisher] = {}
        self.gradients = np.stack([self._gradient(row) for row in range(len(self.inputs))])

    def fit(self, kind: FisherKind) -> Fisher:
        if kind not in self.fitted:
            self.fitted[kind] = fit_fisher(kind, self.model, ["0"], self.dataset, squared_error, 16, CPU)
        return self.fitted[kind]

    def _gradient(self, row: int) -> np.ndarray:
        """(d_out, d_in) of one sample's loss by autograd, the bias last."""
        layer = self._double()
        loss = (layer(self.inputs[row : row + 1].double()) - self.targets[row : row + 1].double()).square().sum()
        parts = torch.autograd.grad(loss, list(layer.parameters()))
        return torch.cat([part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts], dim=1).numpy()

    def inputs_and_output_gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """Every a, (rows, d_in), and every g, (rows, d_out), position by position."""
        layer = self._double()
        output = layer(self.inputs.double()).detach()
        g = (2 * (output - self.targets.double())).numpy()
        a = self.inputs.double().numpy()
        if isinstance(layer, nn.Conv2d):
            a, g = patches(a, layer, g.shape[2:]), np.moveaxis(g, 1, -1)
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        return (a if layer.bias is None else np.c_[a, np.ones(len(a))]), g

    def _double(self) -> nn.Module:
        return copy.deepcopy(self.model[0]).double()


def patches(images: np.ndarray, layer: nn.Conv2d, size: tuple[int, ...]) -> np.ndarray:
    """What lies under the kernel at each output pixel, (n, height, width, channels x kernel)."""
    (above, aside), (down, across), (tall, wide) = layer.padding, layer.stride, layer.kernel_size
    padded = np.pad(images, ((0, 0), (0, 0), (above, above), (aside, aside)))
    found = np.empty((len(images), *size, images.shape[1] * tall * wide))
    for y, x in np.ndindex(*size):
        top, left = y * down, x * across
        found[:, y, x] = padded[:, :, top : top + tall, left : left + wide].reshape(len(images), -1)
    return found


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*CASES[request.param])


def test_diagonal_is_the_mean_squared_gradient_of_every_weight(case: Case) -> None:
    fisher = case.fit("diagonal")
    assert isinstance(fisher, DiagonalFisher)
    assert fisher.kind == "diagonal"
    np.testing.assert_allclose(fisher.layers["0"].numpy(), (case.gradients**2).mean(0), rtol=1e-4)


def test_factors_are_eigenbases_of_the_second_moments_of_inputs_and_output_gradients(case: Case) -> None:
    """Weights, kernels and biases alike: A and B, and Lambda over the gradients that autograd gives."""
    fisher = case.fit("ekfac")
    assert isinstance(fisher, EkfacFisher)
    factors = fisher.layers["0"]
    a, g = case.inputs_and_output_gradients()
    bases = [factors.input_basis.double().numpy(), factors.output_basis.double().numpy()]
    for basis, rows in zip(bases, (a, g), strict=True):
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-5)
        moment = basis.T @ (rows.T @ rows) @ basis
        assert np.linalg.norm(moment - np.diag(np.diag(moment))) <= 1e-4 * np.linalg.norm(moment)
    rotated = bases[1].T @ case.gradients @ bases[0]
    np.testing.assert_allclose(factors.eigenvalues.numpy(), (rotated**2).mean(0), rtol=1e-3)


@pytest.mark.parametrize("damping", [0.1, 0.003])
@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_solve_equals_a_dense_solve_with_the_damping_asked_for(
    case: Case, kind: FisherKind, damping: float, tmp_path: Path
) -> None:
    fitted = case.fit(kind)
    fitted.save(tmp_path / "fisher.safetensors")
    fisher = load_fisher(tmp_path / "fisher.safetensors", damping)
    second = (case.gradients**2).mean(0)
    if isinstance(fitted, EkfacFisher):
        factors = fitted.layers["0"]
        output, inputs = factors.output_basis.double().numpy(), factors.input_basis.double().numpy()
        basis, values = np.kron(output, inputs), ((output.T @ case.gradients @ inputs) ** 2).mean(0)
    else:
        basis, values = np.eye(second.size), second
    matrix = basis * values.ravel() @ basis.T
    gradient = np.random.default_rng(8).normal(size=second.shape)
    dense_solution = np.linalg.solve(matrix + damping * values.mean() * np.eye(len(matrix)), gradient.ravel())
    found = fisher.solve("0", torch.from_numpy(gradient).float()).numpy().ravel()
    assert np.linalg.norm(found - dense_solution) < 1e-3 * np.linalg.norm(dense_solution)
    if damping == 0.1:
        default = fitted.solve("0", torch.from_numpy(gradient).float()).numpy().ravel()
        np.testing.assert_array_equal(default, found)


def test_comes_back_from_disk_as_it_was(fitted: tuple[Tensor, Tensor, EkfacFisher], tmp_path: Path) -> None:
    key = fitted[2].layers["projection"]
    value = LayerFactors(key.input_basis.T, key.output_basis.T, key.eigenvalues + 1)
    fisher = EkfacFisher({"down.0.attn2.to_k": key, "up.1.attn2.to_v": value})
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = load_fisher(tmp_path / "fisher.safetensors")
    assert isinstance(loaded, EkfacFisher)
    assert loaded.layers.keys() == fisher.layers.keys()
    for name, factors in fisher.layers.items():
        assert torch.equal(loaded.layers[name].input_basis, factors.input_basis)
        assert torch.equal(loaded.layers[name].output_basis, factors.output_basis)
        assert torch.equal(loaded.layers[name].eigenvalues, factors.eigenvalues)


def test_diagonal_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    names = ["down.0.attn2.to_k", "conv_in"]
    fisher = DiagonalFisher({name: torch.rand(3, 4, generator=generator) for name in names})
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = load_fisher(tmp_path / "fisher.safetensors").to(CPU)
    assert isinstance(loaded, DiagonalFisher)
    assert loaded.layers.keys() == fisher.layers.keys()
    for name, diagonal in fisher.layers.items():
        assert torch.equal(loaded.layers[name], diagonal)


@pytest.mark.parametrize("metadata", [None, {"kind": "full"}])
def test_a_file_of_no_known_kind_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    save_file({"layer/diagonal": torch.ones(2, 2)}, path, metadata)
    with pytest.raises(UsageError, match=r"fisher\.safetensors holds no Fisher that is known here"):
        load_fisher(path)
