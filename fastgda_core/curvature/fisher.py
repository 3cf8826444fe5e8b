"""The mean empirical Fisher of some layers: diagonal, or EK-FAC (George et al., 2018).

kronfluence fits the diagonal, and the Kronecker factors with their eigenbases. The eigenvalues are estimated again
here: rotating a gradient's few positions costs a fraction of rotating the gradient.
"""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import default_collate

from fastgda_core.curvature.damping import DAMPING
from fastgda_core.curvature.eigenvalues import mean_squared_gradients
from fastgda_core.errors import UsageError

FLOAT64_EIGEN_LIMIT = 4096  # rows of a factor; above, a float64 eigendecomposition takes minutes

FisherKind = Literal["diagonal", "ekfac"]


class Fisher(ABC):
    """The Fisher F of some layers, in a form that solves (F + damping) x = gradient layer by layer."""

    kind: FisherKind
    damping: float  # x the layer's mean eigenvalue

    @abstractmethod
    def solve(self, name: str, gradient: Tensor) -> Tensor:
        """Return (F + damping)^-1 gradient of one layer, (..., d_out, d_in)."""

    @abstractmethod
    def quadratic(self, name: str, step: Tensor) -> float:
        """Return x^T F x of a step x of one layer, (d_out, d_in), without damping."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of this Fisher by `<layer>/<what>`."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor], damping: float) -> Self:
        """Build a Fisher from what `tensors` returned."""

    def to(self, device: torch.device) -> Self:
        return self.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()}, self.damping)

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load_fisher` reads."""
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, path, {"kind": self.kind})


@dataclass(frozen=True)
class DiagonalFisher(Fisher):
    """Mean squared per-sample gradient of every weight, (d_out, d_in) by layer."""

    layers: dict[str, Tensor]
    damping: float = DAMPING
    kind: FisherKind = "diagonal"

    def solve(self, name: str, gradient: Tensor) -> Tensor:
        diagonal = self.layers[name]
        return gradient / (diagonal + self.damping * diagonal.mean())

    def quadratic(self, name: str, step: Tensor) -> float:
        return (step.double().square() * self.layers[name]).sum().item()

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}/diagonal": diagonal for name, diagonal in self.layers.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], damping: float) -> Self:
        return cls({name.rsplit("/", 1)[0]: tensor for name, tensor in tensors.items()}, damping)


@dataclass(frozen=True)
class LayerFactors:
    """Eigenbases of A = E[a a^T] (d_in, d_in) and B = E[g g^T] (d_out, d_out), and Lambda (d_out, d_in).

    Lambda = E[(U_B^T G U_A)^2] over per-sample gradients G: the Fisher's eigenvalues.
    """

    input_basis: Tensor
    output_basis: Tensor
    eigenvalues: Tensor

    def rotate(self, gradient: Tensor) -> Tensor:
        """Return U_B^T G U_A of gradients, (..., d_out, d_in)."""
        return self.output_basis.T @ gradient @ self.input_basis

    def damped(self, damping: float) -> Tensor:
        """Return Lambda + damping, (d_out, d_in); `damping` is x the mean of Lambda."""
        return self.eigenvalues + damping * self.eigenvalues.mean()


@dataclass(frozen=True)
class EkfacFisher(Fisher):
    """The Fisher as U (diag Lambda) U^T with U = U_A kron U_B, by layer."""

    layers: dict[str, LayerFactors]
    damping: float = DAMPING
    kind: FisherKind = "ekfac"

    def solve(self, name: str, gradient: Tensor) -> Tensor:
        factors = self.layers[name]
        solved = factors.rotate(gradient) / factors.damped(self.damping)
        return factors.output_basis @ solved @ factors.input_basis.T

    def quadratic(self, name: str, step: Tensor) -> float:
        factors = self.layers[name]
        return (factors.rotate(step).double().square() * factors.eigenvalues).sum().item()

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{what}": getattr(factors, what)
            for name, factors in self.layers.items()
            for what in ("input_basis", "output_basis", "eigenvalues")
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], damping: float) -> Self:
        grouped: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, what = key.rsplit("/", 1)
            grouped.setdefault(name, {})[what] = tensor
        return cls({name: LayerFactors(**parts) for name, parts in grouped.items()}, damping)


KINDS: dict[str, type[Fisher]] = {"diagonal": DiagonalFisher, "ekfac": EkfacFisher}


def load_fisher(path: Path, damping: float = DAMPING) -> Fisher:
    """Read a file that `Fisher.save` wrote.

    Raises:
        UsageError: the file holds a Fisher of a kind that is not known here.
    """
    with safe_open(path, "pt") as file:
        kind = (file.metadata() or {}).get("kind", "")
        if kind not in KINDS:
            raise UsageError(f"{path} holds no Fisher that is known here: remove it and start the run again")
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    return KINDS[kind].from_tensors(tensors, damping)


def fit_fisher(
    kind: FisherKind,
    model: nn.Module,
    layer_names: list[str],
    dataset: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    batch_size: int,
    device: torch.device,
) -> Fisher:
    """Fit the mean empirical Fisher of some layers.

    Args:
        kind: `diagonal` or `ekfac`.
        model: anything whose forward `loss` drives; it is copied, not changed.
        layer_names: linear and convolutional layers, as in `named_modules()`.
        dataset: a map-style dataset of tensors (or tuples of them), one (training image, eps, t) each.
        loss: `loss(model, batch)`, the sum over the batch of per-sample losses.
        batch_size: of the fit.
        device: where to fit.

    Raises:
        UsageError: a layer runs several rows of one sample, as PixArt's embedder of height and width does.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class LossTask(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return loss(model, batch)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return loss(model, batch)

        def get_influence_tracked_modules(self) -> list[str]:
            return layer_names

    task = LossTask()
    largest = max(size for name in layer_names for size in model.get_parameter(f"{name}.weight").flatten(1).shape)
    arguments = FactorArguments(
        strategy=kind,
        use_empirical_fisher=True,
        has_shared_parameters=_used_repeatedly(model, layer_names, dataset, loss, device),
        lambda_dtype=torch.float64,
        eigendecomposition_dtype=torch.float64 if largest <= FLOAT64_EIGEN_LIMIT else torch.float32,
        covariance_max_examples=None,
        lambda_max_examples=None,
    )
    with torch.enable_grad(), tempfile.TemporaryDirectory() as scratch:
        analyzer = Analyzer(
            "fisher",
            prepare_model(copy.deepcopy(model), task),
            task,
            cpu=device.type == "cpu",
            output_dir=scratch,
            disable_tqdm=True,
            disable_model_save=True,
        )
        options = {"factor_args": arguments, "overwrite_output_dir": True}
        if kind == "diagonal":
            analyzer.fit_lambda_matrices("fisher", dataset, per_device_batch_size=batch_size, **options)
            factors = analyzer.load_lambda_matrices("fisher")
        else:
            analyzer.fit_covariance_matrices("fisher", dataset, per_device_batch_size=batch_size, **options)
            analyzer.perform_eigendecomposition("fisher", **options)
            factors = analyzer.load_eigendecomposition("fisher")
    if kind == "diagonal":
        counts = factors["num_lambda_processed"]
        means = {name: factors["lambda_matrix"][name] / counts[name] for name in layer_names}
        return DiagonalFisher({name: mean.float().to(device) for name, mean in means.items()})
    bases = {
        name: tuple(
            factors[which][name].float().to(device) for which in ("gradient_eigenvectors", "activation_eigenvectors")
        )
        for name in layer_names
    }
    modules = {name: model.get_submodule(name) for name in layer_names}
    layers = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    eigenvalues = mean_squared_gradients(model, layers, bases, dataset, loss, batch_size, device)
    return EkfacFisher({name: LayerFactors(bases[name][1], bases[name][0], eigenvalues[name]) for name in layer_names})


@torch.no_grad()
def _used_repeatedly(
    model: nn.Module,
    layer_names: list[str],
    dataset: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    device: torch.device,
) -> bool:
    """Return whether one forward calls a layer more than once; kronfluence has to be told.

    Raises:
        UsageError: a layer runs several rows of one sample, each of which kronfluence would take for a sample.
    """
    from accelerate.utils import send_to_device

    calls: Counter[str] = Counter()

    def look(name: str, _layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name] += 1
        if len(output) != 1:
            raise UsageError(f"layer {name} runs {len(output)} rows of one sample: choose fewer teacher.layers")

    handles = [model.get_submodule(name).register_forward_hook(partial(look, name)) for name in layer_names]
    try:
        loss(model, send_to_device(default_collate([dataset[0]]), device))
    finally:
        for handle in handles:
            handle.remove()
    return max(calls.values(), default=0) > 1
