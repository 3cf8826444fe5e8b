"""The diffusion training loss of the model at hand, per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgda_core.errors import UsageError


def add_noise(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t of the forward process, (n, c, h, w), for each sample's own timestep (n,)."""
    return scheduler.add_noise(clean, noise, timesteps)


def prediction_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the denoiser was trained to output, by the scheduler's `prediction_type`; (n, c, h, w).

    Raises:
        UsageError: a prediction type other than epsilon, v_prediction or sample.
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(clean, noise, timesteps)
        case "sample":
            return clean
        case other:
            raise UsageError(
                f"scheduler prediction_type {other!r} is not supported: use epsilon, v_prediction or sample"
            )


def denoise(unet: torch.nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The denoiser's output, (n, c, h, w); text is (n, tokens, d_text)."""
    return unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]


def per_sample_loss(
    unet: torch.nn.Module, scheduler: Any, clean: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """`|| target - model(x_t, c, t) ||^2 / n_elements` of each sample, (n,).

    Args:
        unet: the denoiser.
        scheduler: a diffusers scheduler; its config says the noise schedule and the target.
        clean: latents, (n, c, h, w).
        text: caption embeddings, (n, tokens, d_text).
        timesteps: (n,) integers in [0, num_train_timesteps).
        noise: standard normal, (n, c, h, w).
    """
    noisy = add_noise(scheduler, clean, noise, timesteps)
    target = prediction_target(scheduler, clean, noise, timesteps)
    residual = denoise(unet, noisy, timesteps, text) - target
    return residual.square().flatten(1).mean(1)
