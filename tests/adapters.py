"""Tiny LoRAs of the tiny Stable Diffusion folder, by diffusers' own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.loss import take
from fastgda_core.diffusion.model import DiffusionModel, load_model

RANK = 2
STEPS = 120  # of a training


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


def train_lora(base: DiffusionModel, model: Path, folder: Path, latents: Tensor, captions: list[str]) -> Path:
    """Train a LoRA of a model on latents, (n, c, h, w), with their captions, and write it.

    From random A and a small B, as one that is all zeros would be left out; timesteps and noise are new in every step.
    """
    tensors = lora_tensors(base.denoiser)
    started = {name: 0.01 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    learner = load_model(model, base.device, adapter=save_lora(folder.with_name(f"{folder.name} at first"), started))
    weights = {f"{name}.weight": layer.weight for name, layer in select_layers(learner.denoiser, "lora").items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer, generator = torch.optim.Adam(weights.values(), lr=1e-2), torch.Generator().manual_seed(0)
    condition, steps = learner.encode_captions(captions), learner.schedule.train_timesteps
    for _ in range(STEPS):
        rows = torch.randint(len(latents), (16,), generator=generator)
        noise = torch.randn(16, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(steps, (16,), generator=generator)
        optimizer.zero_grad()
        learner.losses(latents[rows], take(condition, rows), timesteps, noise).mean().backward()
        optimizer.step()
    return save_lora(folder, {name: weight.detach().contiguous() for name, weight in weights.items()})
