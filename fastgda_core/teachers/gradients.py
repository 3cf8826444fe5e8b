"""Gradients of the diffusion loss at layer outputs, without a single weight gradient.

For a layer s = W a the weight gradient is the sum over positions of (dL/ds) a^T. Where a is the same at every
timestep, as the caption embedding in cross-attention keys and values, dL/ds may be summed over timesteps
before it is multiplied with a. One backward through the activations serves all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgda_core.curvature.layers import Layer, output_rows
from fastgda_core.curvature.taps import by_sample, tapped
from fastgda_core.diffusion.loss import Condition, take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.precision import multiplying
from fastgda_core.errors import UsageError
from fastgda_core.teachers.micro_batch import MicroBatch


def output_gradients(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    clean: Tensor,
    condition: Condition,
    timesteps: Tensor,
    noise: Tensor,
) -> tuple[Tensor, dict[str, list[Tensor]], dict[str, Tensor]]:
    """Return per-sample losses, layer inputs and loss gradients at layer outputs.

    Args:
        model: the frozen model.
        layers: by name.
        clean: latents, (n, c, h, w).
        condition: of each row.
        timesteps: (n,).
        noise: (n, c, h, w).

    Returns:
        losses (n,); by layer name its inputs as they came, for `input_rows`; and by layer name dL_i/ds_i,
        (n, positions, d_out), the positions of several calls one after the other.

    Raises:
        UsageError: a layer takes no part in the forward pass.
    """
    rows = (clean, condition, timesteps, noise)
    with torch.enable_grad():
        if model.compiled_denoisers is None:
            losses, inputs, outputs = _forward(model, layers, rows)
        else:
            key = ("taps", *layers)
            if key not in model.compiled_denoisers:
                model.compiled_denoisers[key] = _CompiledTaps(model, layers, rows)
            losses, inputs, outputs = model.compiled_denoisers[key].forward(model, rows)
        with multiplying(model.precision):
            flat = [output for name in layers for output in outputs[name]]
            gradients = iter(torch.autograd.grad(losses.sum(), flat))
    by_position = {
        name: torch.cat([by_sample(output_rows(layer, next(gradients)), len(clean)) for _ in outputs[name]], dim=1)
        for name, layer in layers.items()
    }
    return losses.detach(), inputs, by_position


Rows = tuple[Tensor, Condition, Tensor, Tensor]  # clean, condition, timesteps, noise
Tapped = tuple[Tensor, dict[str, list[Tensor]], dict[str, list[Tensor]]]


def _forward(model: DiffusionModel, layers: Mapping[str, Layer], rows: Rows) -> Tapped:
    """Return the losses and, by layer, its inputs and outputs."""
    with tapped(layers, len(rows[0])) as taps:
        losses = model.losses(*rows)
    if idle := layers.keys() - taps.outputs.keys():
        raise UsageError(f"layer {min(idle)} takes no part in the forward pass: choose fewer teacher.layers")
    return losses, taps.inputs, taps.outputs


class _Probed(nn.Module):
    """A denoiser's twin on the same weights that adds given tensors to layers' outputs, and returns the layers' inputs.

    Compiled code does not see hooks that come and go, and gives no gradient at tensors inside it. Here the hooks stay,
    and the gradient is that of an argument.
    """

    def __init__(self, denoiser: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        shared = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
        self.denoiser = copy.deepcopy(denoiser, shared)
        self.inputs: dict[str, list[Tensor]] = {}
        self.added: Mapping[str, list[Tensor]] = {}
        for name in names:
            self.denoiser.get_submodule(name).register_forward_hook(partial(self._tap, name))

    def _tap(self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen = self.inputs[name]
        seen.append(inputs[0].detach())
        return output + self.added[name][len(seen) - 1]

    def forward(
        self, noisy: Tensor, added: Mapping[str, list[Tensor]], **arguments: Any
    ) -> tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]:
        self.added, self.inputs = added, {name: [] for name in added}
        output, inputs = self.denoiser(noisy, **arguments), self.inputs
        self.added, self.inputs = {}, {}
        return output, inputs


class _CompiledTaps:
    """`_forward` through compiled code."""

    def __init__(self, model: DiffusionModel, layers: Mapping[str, Layer], rows: Rows) -> None:
        self.denoiser = torch.compile(_Probed(model.denoiser, layers))
        clean, condition, timesteps, noise = rows
        _, _, outputs = _forward(model, layers, (clean[:1], take(condition, slice(1)), timesteps[:1], noise[:1]))
        # Zeros of the shape of one row's outputs, without the memory for them.
        self.zeros = {name: [value.new_zeros(()).expand_as(value) for value in outputs[name]] for name in layers}

    def forward(self, model: DiffusionModel, rows: Rows) -> Tapped:
        samples = len(rows[0])
        added = {
            name: [zero[:1].expand(samples * len(zero), *zero.shape[1:]).requires_grad_() for zero in zeros]
            for name, zeros in self.zeros.items()
        }
        inputs: dict[str, list[Tensor]] = {}

        def probed(noisy: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
            output, seen = self.denoiser(noisy, added, **arguments)
            inputs.update({name: [by_sample(value, samples) for value in values] for name, values in seen.items()})
            return output

        return model.losses(*rows, probed), inputs, added


@torch.no_grad()
def layer_inputs(model: DiffusionModel, layers: Mapping[str, Layer], rows: Rows) -> dict[str, list[Tensor]]:
    """Return the inputs of layers in one forward, by name, one tensor a call."""
    as_it_is = replace(model, compiled_denoisers=None)  # compiled code does not see hooks that came after it
    with tapped(layers, len(rows[0])) as taps:
        as_it_is.losses(*rows)
    return taps.inputs


@torch.no_grad()
def steady_layers(
    model: DiffusionModel, layers: Mapping[str, Layer], condition: Condition, micro_batch: MicroBatch
) -> dict[str, str]:
    """Find the layers whose input is a function of the caption alone: the same at every timestep and noise.

    One caption goes through the denoiser twice, at both ends of the schedule with other noise, and the inputs are
    compared.

    Returns:
        by layer name, the name of the first layer that has the very same input rows.
    """
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, *model.latent_shape, generator=generator).to(model.device) for _ in range(2))
    timesteps = torch.tensor([0, model.schedule.train_timesteps - 1], device=model.device)
    captions = take(condition, torch.zeros(2, dtype=torch.long, device=model.device))

    def look(stretch: slice) -> dict[str, list[Tensor]]:
        return layer_inputs(
            model, layers, (clean[stretch], take(captions, stretch), timesteps[stretch], noise[stretch])
        )

    looks = [inputs for _, inputs in micro_batch.run(2, look)]
    first_with: dict[tuple[int, bool], str] = {}
    return {
        name: first_with.setdefault((seen[0].data_ptr(), layers[name].bias is None), name)
        for name, seen in looks[-1].items()
        if len(seen) == 1 and torch.allclose(looks[0][name][0][0], seen[0][-1], rtol=1e-5, atol=1e-6)
    }


def weight_gradient(output_gradient: Tensor, layer_input: Tensor) -> Tensor:
    """Return dL/dW per row, (n, d_out, d_in), from dL/ds (n, positions, d_out) and the layer's input rows."""
    return output_gradient.transpose(1, 2) @ layer_input
