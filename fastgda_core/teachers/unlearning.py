"""The unlearning step: where the weights go when the model forgets a query."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastgda_core.curvature.ekfac import EkfacFisher
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stream_key, uniform
from fastgda_core.teachers.gradients import cross_attention_kv_layers, output_gradients, weight_gradient
from fastgda_core.teachers.training_loss import check_finite


def query_gradient(
    model: DiffusionModel, latent: Tensor, text: Tensor, *, owner: int, seed: int, pairs: int, micro_batch: int
) -> dict[str, Tensor]:
    """grad L(z_hat, theta_0): the mean over `pairs` Monte-Carlo (eps, t) pairs.

    Timesteps are stratified, t_i uniform in the i-th of `pairs` equal parts of [0, T): unbiased, with less variance
    than independent draws.

    Args:
        model: the frozen model.
        latent: of the generated image, (c, h, w).
        text: embedding of its caption, (tokens, d_text).
        owner: a number that stands for the query in the noise stream, in [0, 2^48).
        seed: of the noise stream.
        pairs: how many (eps, t) pairs.
        micro_batch: pairs per forward.

    Returns:
        gradient by layer name, each (d_out, d_in) float32.
    """
    train_timesteps = model.scheduler.config.num_train_timesteps
    strata = (torch.arange(pairs) + uniform(stream_key(seed, "query timesteps"), owner, pairs)) / pairs
    timesteps = (strata * train_timesteps).long().clamp_(max=train_timesteps - 1).to(model.device)
    noise_key = stream_key(seed, "query noise")
    summed: dict[str, Tensor] = {}
    for draws in torch.arange(pairs, device=model.device).split(micro_batch):
        rows = len(draws)
        batch_timesteps = timesteps[draws]
        noise = gaussian_noise(noise_key, torch.full_like(draws, owner), batch_timesteps, draws, tuple(latent.shape))
        losses, gradients = output_gradients(
            model,
            latent.expand(rows, *latent.shape),
            text.expand(rows, *text.shape),
            batch_timesteps,
            noise,
        )
        check_finite(losses, torch.full_like(draws, owner), batch_timesteps)
        for name, gradient in gradients.items():
            summed[name] = summed.get(name, 0) + gradient.sum(0)
    # The layer's input is the caption embedding in every pair: one contraction at the end.
    return {name: weight_gradient(total[None], text[None])[0] / pairs for name, total in summed.items()}


def unlearning_update(
    fisher: EkfacFisher, gradient: dict[str, Tensor], *, alpha: float, training_size: int
) -> dict[str, Tensor]:
    """Delta theta = (alpha / N) F^-1 grad L(z_hat, theta_0), by layer name, each (d_out, d_in).

    Source: Wang et al., "Data attribution for text-to-image models by unlearning synthesized images" (2024), Eq. 5.
    """
    return {name: fisher.solve(name, layer) * (alpha / training_size) for name, layer in gradient.items()}


@contextmanager
def moved(model: DiffusionModel, update: dict[str, Tensor]) -> Iterator[None]:
    """While active, the model's weights are theta_0 + update."""
    layers = cross_attention_kv_layers(model.unet)
    original = {name: layers[name].weight.detach().clone() for name in update}
    try:
        with torch.no_grad():
            for name, change in update.items():
                layers[name].weight.add_(change)
        yield
    finally:
        with torch.no_grad():
            for name, weight in original.items():
                layers[name].weight.copy_(weight)
