"""Gradients of the diffusion loss with respect to layer outputs, without a single weight gradient.

For a linear layer s = W a the weight gradient is sum over tokens of (dL/ds) a^T. Cross-attention
keys and values see a = the caption embedding, the same at every timestep, so dL/ds may be summed
over timesteps before it meets a: one backward through activations serves everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.errors import UsageError


def cross_attention_kv_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Every `attn2.to_k` / `attn2.to_v` layer by name (design section 4, "Fisher").

    Raises:
        UsageError: the model has none.
    """
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    if not layers:
        raise UsageError("the model has no cross-attention key/value layers (attn2.to_k, attn2.to_v)")
    return layers


@contextmanager
def _probes(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """While active, each forward leaves in the yielded dict a zero added to each layer's output, to take grads at."""
    probes: dict[str, Tensor] = {}

    def attach(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            probes[name] = torch.zeros_like(output, requires_grad=True)
            return output + probes[name]

        return hook

    handles = [layer.register_forward_hook(attach(name)) for name, layer in layers.items()]
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(
    model: DiffusionModel, clean: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-sample losses and their gradients at the outputs of the cross-attention key/value layers.

    Args:
        model: the frozen model.
        clean: latents, (n, c, h, w).
        text: caption embeddings, (n, tokens, d_text).
        timesteps: (n,).
        noise: (n, c, h, w).

    Returns:
        losses (n,), and dL_i/ds_i by layer name, each (n, tokens, d_out).
    """
    layers = cross_attention_kv_layers(model.unet)
    with torch.enable_grad(), _probes(layers) as probes:
        losses = per_sample_loss(model.unet, model.scheduler, clean, text, timesteps, noise)
        gradients = torch.autograd.grad(losses.sum(), [probes[name] for name in layers])
    return losses.detach(), dict(zip(layers, gradients, strict=True))


def weight_gradient(output_gradient: Tensor, layer_input: Tensor) -> Tensor:
    """dL/dW per sample, (n, d_out, d_in), from dL/ds (n, tokens, d_out) and a (n, tokens, d_in)."""
    return torch.einsum("nto,nti->noi", output_gradient, layer_input)
