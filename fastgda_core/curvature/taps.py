"""What layers see and give in a forward, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastgda_core.curvature.layers import Layer


@dataclass
class Taps:
    """Inputs and outputs by layer; a list of calls, as a module may be used in several places."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def tapped(layers: Mapping[str, Layer], samples: int) -> Iterator[Taps]:
    """While active, each forward leaves the layers' inputs and outputs, the outputs ready to take gradients at.

    Inputs have one row for each of the samples: where a layer takes several of a sample's numbers as so many rows, as
    PixArt's embedder of height and width does, these become positions.
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
    """One row for each sample: further rows of a sample become positions."""
    return value if len(value) == samples else value.reshape(samples, -1, value.shape[-1])
