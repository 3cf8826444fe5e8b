"""Gradients of the diffusion loss at layer outputs, without a single weight gradient.

For a layer s = W a the weight gradient is the sum over positions of (dL/ds) a^T. Where a is the same at every
timestep, as the caption embedding in cross-attention keys and values, dL/ds may be summed over timesteps
before it meets a; one backward through activations serves everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastgda_core.curvature.layers import Layer, output_rows
from fastgda_core.diffusion.loss import Condition, take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.precision import multiplying
from fastgda_core.errors import UsageError
from fastgda_core.teachers.micro_batch import MicroBatch


@dataclass
class _Taps:
    """What the layers saw and gave in a forward, call by call: a module may be used in several places."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def _tapped(layers: Mapping[str, Layer], samples: int) -> Iterator[_Taps]:
    """While active, each forward leaves the layers' inputs and outputs, the outputs ready to take gradients at.

    Inputs have one row for each of the samples: where a layer takes several of a sample's numbers as so many rows, as
    PixArt's embedder of height and width does, these become positions.
    """
    taps = _Taps()

    def attach(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad and torch.is_grad_enabled():
                output.requires_grad_(True)
            taps.inputs.setdefault(name, []).append(_by_sample(inputs[0].detach(), samples))
            taps.outputs.setdefault(name, []).append(output)

        return hook

    handles = [layer.register_forward_hook(attach(name)) for name, layer in layers.items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    clean: Tensor,
    condition: Condition,
    timesteps: Tensor,
    noise: Tensor,
) -> tuple[Tensor, dict[str, list[Tensor]], dict[str, Tensor]]:
    """Per-sample losses, layer inputs and loss gradients at layer outputs.

    Args:
        model: the frozen model.
        layers: by name.
        clean: latents, (n, c, h, w).
        condition: of each row.
        timesteps: (n,).
        noise: (n, c, h, w).

    Returns:
        losses (n,); by layer name its inputs as they came, for `input_rows`; and dL_i/ds_i, (n, positions, d_out), the
        positions of several calls one after the other.

    Raises:
        UsageError: a layer takes no part in the forward pass.
    """
    with torch.enable_grad(), _tapped(layers, len(clean)) as taps:
        losses = model.losses(clean, condition, timesteps, noise)
        if idle := layers.keys() - taps.outputs.keys():
            raise UsageError(f"layer {min(idle)} takes no part in the forward pass: choose fewer teacher.layers")
        with multiplying(model.precision):
            flat = [output for name in layers for output in taps.outputs[name]]
            gradients = iter(torch.autograd.grad(losses.sum(), flat))
    rows = {
        name: torch.cat(
            [_by_sample(output_rows(layer, next(gradients)), len(clean)) for _ in taps.outputs[name]], dim=1
        )
        for name, layer in layers.items()
    }
    return losses.detach(), taps.inputs, rows


@torch.no_grad()
def steady_layers(
    model: DiffusionModel, layers: Mapping[str, Layer], condition: Condition, micro_batch: MicroBatch
) -> dict[str, str]:
    """The layers whose input is a function of the caption alone: the same at every timestep and noise.

    Found by looking: one caption goes through the denoiser twice, at both ends of the schedule with other noise.

    Returns:
        by layer name, the name of the first layer that has the very same input rows.
    """
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, *model.latent_shape, generator=generator).to(model.device) for _ in range(2))
    timesteps = torch.tensor([0, model.schedule.train_timesteps - 1], device=model.device)
    captions = take(condition, torch.zeros(2, dtype=torch.long, device=model.device))
    as_it_is = replace(model, compiled_denoiser=None)  # compiled code does not see hooks that came after it

    def look(stretch: slice) -> dict[str, list[Tensor]]:
        with _tapped(layers, len(clean[stretch])) as taps:
            as_it_is.losses(clean[stretch], take(captions, stretch), timesteps[stretch], noise[stretch])
        return taps.inputs

    looks = [inputs for _, inputs in micro_batch.run(2, look)]
    first_with: dict[tuple[int, bool], str] = {}
    return {
        name: first_with.setdefault((seen[0].data_ptr(), layers[name].bias is None), name)
        for name, seen in looks[-1].items()
        if len(seen) == 1 and torch.allclose(looks[0][name][0][0], seen[0][-1], rtol=1e-5, atol=1e-6)
    }


def _by_sample(value: Tensor, samples: int) -> Tensor:
    return value if len(value) == samples else value.reshape(samples, -1, value.shape[-1])


def weight_gradient(output_gradient: Tensor, layer_input: Tensor) -> Tensor:
    """dL/dW per row, (n, d_out, d_in), from dL/ds (n, positions, d_out) and the layer's input rows."""
    return output_gradient.transpose(1, 2) @ layer_input
