"""Tiny LoRAs of the tiny Stable Diffusion folder, by diffusers' own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

RANK = 2


def lora_tensors(denoiser: nn.Module, *, seed: int = 0) -> dict[str, Tensor]:
    """Random A and B of attention's queries and values and of a convolution of each residual block, float32."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, module in denoiser.named_modules():
        if not name.endswith(("to_q", "to_v", "conv1")):
            continue
        assert isinstance(module, nn.Linear | nn.Conv2d)
        shape = module.weight.shape
        found[f"{name}.lora_A.weight"] = 0.1 * torch.randn(RANK, *shape[1:], generator=generator)
        found[f"{name}.lora_B.weight"] = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator)
    return found


def save_lora(folder: Path, tensors: dict[str, Tensor], *, alpha: float | None = None, **settings: Any) -> Path:
    """Write a LoRA as diffusers' training scripts do; its settings go into the header where an alpha is given."""
    metadata = None if alpha is None else {"r": RANK, "lora_alpha": alpha, **settings}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=tensors, unet_lora_adapter_metadata=metadata)
    return folder
