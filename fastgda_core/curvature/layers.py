"""The layers whose weights move, and their weight gradients as matrices.

A layer's gradient is one matrix (d_out, d_in), as in K-FAC (Martens & Grosse, 2015; Grosse & Martens, 2016). In a
convolution d_in counts channels x kernel. In a layer with a bias the last column is the bias. kronfluence's factors
have the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgda_core.errors import UsageError

# Joint attention (SD3) has no layer that attends to the caption alone: there its projections of the text stand in.
_PATTERNS = {
    "cross-attn-kv": r"attn2\.to_[kv]|add_[kv]_proj",
    "cross-attn": r"attn2\.(to_[qkv]|to_out\.0)|add_[qkv]_proj|to_add_out",
    "attn": r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out",
    # Of transformer blocks, and what stands for it in a convolutional block.
    "mlp": r"ff(_context)?\.net\..+|proj_mlp|ff\.conv_(inverted|point)|resnets\.\d+\.conv[12]",
    "all": r".*",
    "lora": r"lora_[AB]",
}
_ADAPTER = re.compile(r".*\.lora_[AB]")
SELECTIONS = tuple(_PATTERNS)

Layer = nn.Linear | nn.Conv2d


def select_layers(denoiser: nn.Module, selection: str) -> dict[str, Layer]:
    """Select layers by name: `cross-attn-kv`, `cross-attn`, `attn`, `mlp`, `all` linear and convolutional ones, `lora`.

    The layers of an adapter are selected by `lora` and by nothing else; the others are the model's own.

    Raises:
        UsageError: the model has no such layer, or the gradient of a selected convolution is not one matrix.
    """
    pattern = re.compile(rf"(.*\.)?({_PATTERNS[selection]})")
    layers: dict[str, Layer] = {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and pattern.fullmatch(name)
        and (selection == "lora") == bool(_ADAPTER.fullmatch(name))
    }
    if not layers and selection == "lora":
        raise UsageError("teacher.layers lora needs an adapter: name its folder in model.adapter")
    if not layers:
        raise UsageError(
            f"the model has no {selection} layer: set teacher.layers to another of {', '.join(SELECTIONS)}"
        )
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and (
            layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        ):
            raise UsageError(
                f"{name} is a grouped or non-zero padded convolution: choose fewer layers in teacher.layers"
            )
    return layers


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Return (d_out, d_in) of the layer's gradient."""
    weight = layer.weight.flatten(1)
    return weight.shape[0], weight.shape[1] + (layer.bias is not None)


def input_rows(layer: Layer, values: Sequence[Tensor]) -> Tensor:
    """Return the rows that a layer saw, (n, positions, d_in): tokens, or patches under a kernel; a last 1 for the bias.

    `values` holds the input of each call. The positions of several calls stand one after the other.
    """
    return torch.cat([_rows_of_call(layer, value) for value in values], dim=1)


def _rows_of_call(layer: Layer, value: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = nn.functional.unfold(value, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = patches.transpose(1, 2)
    else:
        rows = value.reshape(len(value), -1, value.shape[-1])
    if layer.bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)


def output_rows(layer: Layer, value: Tensor) -> Tensor:
    """Return a layer's output, or the gradient at it, as (n, positions, d_out)."""
    if isinstance(layer, nn.Conv2d):
        return value.flatten(2).transpose(1, 2)
    return value.reshape(len(value), -1, value.shape[-1])


@torch.no_grad()
def add_to_weights(layer: Layer, change: Tensor) -> None:
    """Add a (d_out, d_in) matrix to weight and bias."""
    change = change.to(layer.weight.dtype)
    columns = layer.weight[0].numel()
    layer.weight.add_(change[:, :columns].reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.add_(change[:, columns])
