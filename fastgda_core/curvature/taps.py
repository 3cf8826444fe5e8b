"""Hooks that record the inputs and outputs of layers in a forward, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastgda_core.curvature.layers import Layer


@dataclass
class Taps:
    """Recorded inputs and outputs by layer, one list entry a call, as a module may be used in several places."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def tapped(layers: Mapping[str, Layer], samples: int) -> Iterator[Taps]:
    """Record the layers' inputs and outputs of each forward in the block; gradients can be taken at the outputs.

    Inputs have one row for each of the samples. Where a layer takes several numbers of a sample as so many rows, as
    PixArt's embedder of height and width does, these rows become positions.
    """
    taps = Taps()

    def attach(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad and torch.is_grad_enabled():
                output.requires_grad_(True)
            taps.inputs.setdefault(name, []).append(by_sample(inputs[0].detach(), samples))
            taps.outputs.setdefault(name, []).append(output)

        return hook

    handles = [layer.register_forward_hook(attach(name)) for name, layer in layers.items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def by_sample(value: Tensor, samples: int) -> Tensor:
    """Return one row for each sample; further rows of a sample become positions."""
    return value if len(value) == samples else value.reshape(samples, -1, value.shape[-1])
