"""EK-FAC Fisher of the cross-attention key/value layers (George et al., 2018), fitted by kronfluence."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DAMPING = 0.1  # x the layer's mean eigenvalue: design section 4


@dataclass(frozen=True)
class LayerFactors:
    """Eigenbases of A = E[a a^T] (d_in, d_in) and B = E[g g^T] (d_out, d_out), and Lambda (d_out, d_in).

    Lambda = E[(U_B^T G U_A)^2] over per-sample gradients G: the Fisher's eigenvalues.
    """

    input_basis: Tensor
    output_basis: Tensor
    eigenvalues: Tensor


@dataclass(frozen=True)
class EkfacFisher:
    """The mean empirical Fisher, layer by layer, as U (diag Lambda) U^T with U = U_A kron U_B."""

    layers: dict[str, LayerFactors]

    def solve(self, name: str, gradient: Tensor) -> Tensor:
        """(F + damping)^-1 gradient of one layer, (d_out, d_in)."""
        factors = self.layers[name]
        rotated = factors.output_basis.T @ gradient @ factors.input_basis
        damped = factors.eigenvalues + DAMPING * factors.eigenvalues.mean()
        return factors.output_basis @ (rotated / damped) @ factors.input_basis.T

    def to(self, device: torch.device) -> EkfacFisher:
        return EkfacFisher(
            {
                name: LayerFactors(*(tensor.to(device) for tensor in (f.input_basis, f.output_basis, f.eigenvalues)))
                for name, f in self.layers.items()
            }
        )

    def save(self, path: Path) -> None:
        tensors = {}
        for name, factors in self.layers.items():
            tensors[f"{name}/input_basis"] = factors.input_basis.contiguous()
            tensors[f"{name}/output_basis"] = factors.output_basis.contiguous()
            tensors[f"{name}/eigenvalues"] = factors.eigenvalues.contiguous()
        save_file(tensors, path)


def load_ekfac(path: Path) -> EkfacFisher:
    tensors = load_file(path)
    names = {key.rsplit("/", 1)[0] for key in tensors}
    return EkfacFisher(
        {
            name: LayerFactors(
                tensors[f"{name}/input_basis"], tensors[f"{name}/output_basis"], tensors[f"{name}/eigenvalues"]
            )
            for name in sorted(names)
        }
    )


def fit_ekfac(
    model: nn.Module, layer_names: list[str], dataset: Any, loss: Any, batch_size: int, device: torch.device
) -> EkfacFisher:
    """Fit the mean empirical Fisher of some linear layers.

    Args:
        model: anything whose forward `loss` drives; it is copied, not changed.
        layer_names: linear layers, as in `named_modules()`.
        dataset: a map-style dataset of tensors (or tuples of them), one (training image, eps, t) each.
        loss: `loss(model, batch)`, the sum over the batch of per-sample losses.
        batch_size: of the fit.
        device: where to fit.
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
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True, lambda_dtype=torch.float64)
    with torch.enable_grad(), tempfile.TemporaryDirectory() as scratch:
        analyzer = Analyzer(
            "ekfac",
            prepare_model(copy.deepcopy(model), task),
            task,
            cpu=device.type == "cpu",
            output_dir=scratch,
            disable_tqdm=True,
            disable_model_save=True,
        )
        analyzer.fit_all_factors(
            "ekfac", dataset, per_device_batch_size=batch_size, factor_args=arguments, overwrite_output_dir=True
        )
        factors = analyzer.load_all_factors("ekfac")
    return EkfacFisher(
        {
            name: LayerFactors(
                factors["activation_eigenvectors"][name].float(),
                factors["gradient_eigenvectors"][name].float(),
                (factors["lambda_matrix"][name] / factors["num_lambda_processed"][name]).float(),
            )
            for name in layer_names
        }
    )
