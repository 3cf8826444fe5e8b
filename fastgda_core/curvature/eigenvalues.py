"""Lambda of EK-FAC (George et al., 2018): the mean squared per-sample gradient, seen in the eigenbasis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastgda_core.curvature.layers import Layer, input_rows, matrix_shape, output_rows
from fastgda_core.curvature.taps import by_sample, tapped


@torch.enable_grad()
def mean_squared_gradients(
    model: nn.Module,
    layers: Mapping[str, Layer],
    bases: Mapping[str, tuple[Tensor, Tensor]],
    dataset: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    batch_size: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return E[(U_B^T G U_A)^2] of each layer over per-sample gradients G, (d_out, d_in) float32 by layer name.

    Args:
        model: in eval mode, on its device.
        layers: of the model, by name.
        bases: U_B (d_out, d_out) and U_A (d_in, d_in) of each layer.
        dataset: a map-style dataset of tuples of tensors.
        loss: `loss(model, batch)`, the sum over the batch of per-sample losses.
        batch_size: of the passes.
        device: of the model.
    """
    from accelerate.utils import send_to_device

    sums = {
        name: torch.zeros(matrix_shape(layer), dtype=torch.float64, device=device) for name, layer in layers.items()
    }
    for batch in DataLoader(dataset, batch_size=batch_size):
        samples = len(batch[0])
        with tapped(layers, samples) as taps:
            total = loss(model, send_to_device(batch, device))
        outputs = [output for name in layers for output in taps.outputs[name]]
        gradients = iter(torch.autograd.grad(total, outputs))
        with torch.no_grad():
            for name, layer in layers.items():
                calls = [by_sample(output_rows(layer, next(gradients)), samples) for _ in taps.outputs[name]]
                seen = input_rows(layer, taps.inputs[name])
                sums[name] += _rotated(torch.cat(calls, dim=1), seen, *bases[name]).square().sum(0)
    return {name: (value / len(dataset)).float() for name, value in sums.items()}


def _rotated(gradient: Tensor, seen: Tensor, output_basis: Tensor, input_basis: Tensor) -> Tensor:
    """Return U_B^T G U_A of each sample, (n, d_out, d_in), where G is the sum over positions of gradient^T seen.

    With few positions it is cheaper to rotate `gradient` and `seen` than to rotate G.
    """
    positions, d_out, d_in = seen.shape[1], len(output_basis), len(input_basis)
    if positions * (d_in**2 + d_out**2) < d_in * d_out * (d_in + d_out):
        return (gradient @ output_basis).transpose(1, 2) @ (seen @ input_basis)
    return output_basis.T @ (gradient.transpose(1, 2) @ seen) @ input_basis
