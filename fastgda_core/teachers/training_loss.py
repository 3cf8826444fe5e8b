"""Losses of training samples under a noise plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise


@dataclass(frozen=True)
class SampleBlock:
    """Training samples ready for the denoiser; a sample may own several captions.

    train_ids: (n,); latents: (n, c, h, w); text: (m, tokens, d_text), m captions of all samples;
    owner: (m,), the row of each caption's sample; caption_number: (m,), its number within the sample.
    """

    train_ids: Tensor
    latents: Tensor
    text: Tensor
    owner: Tensor
    caption_number: Tensor

    def mean_over_captions(self, values: Tensor) -> Tensor:
        """(..., m) per caption to (..., n) per sample."""
        sums = values.new_zeros(*values.shape[:-1], len(self.train_ids)).index_add_(-1, self.owner, values)
        return sums / torch.bincount(self.owner, minlength=len(self.train_ids))


@dataclass(frozen=True)
class PlannedBatch:
    """Some captions of a block at every planned (timestep, draw), flattened caption-major."""

    captions: slice
    per_caption: int
    clean: Tensor
    text: Tensor
    timesteps: Tensor
    noise: Tensor
    train_ids: Tensor


def planned_batches(
    model: DiffusionModel, plan: NoisePlan, block: SampleBlock, micro_batch: int
) -> Iterator[PlannedBatch]:
    """Every (caption, timestep, draw) of a block; about `micro_batch` forwards at a time, whole captions each."""
    timesteps = plan.timestep_values(model.scheduler.config.num_train_timesteps).to(model.device)
    timesteps = timesteps.repeat_interleave(plan.draws)
    draws = torch.arange(plan.draws, device=model.device).repeat(len(timesteps) // plan.draws)
    per_caption = len(timesteps)
    step = max(1, micro_batch // per_caption)
    for start in range(0, len(block.owner), step):
        captions = slice(start, start + step)
        owner = block.owner[captions]
        rows = owner.repeat_interleave(per_caption)
        batch_timesteps = timesteps.repeat(len(owner))
        train_ids = block.train_ids[rows]
        noise = gaussian_noise(
            plan.key(),
            train_ids,
            batch_timesteps,
            draws.repeat(len(owner)),
            tuple(block.latents.shape[1:]),
            captions=block.caption_number[captions].repeat_interleave(per_caption),
        )
        text = block.text[captions].repeat_interleave(per_caption, dim=0)
        yield PlannedBatch(captions, per_caption, block.latents[rows], text, batch_timesteps, noise, train_ids)


@torch.no_grad()
def training_losses(model: DiffusionModel, plan: NoisePlan, block: SampleBlock, micro_batch: int) -> Tensor:
    """L(z_i, theta) of each sample of a block under the model's present weights.

    Forwards run in float32, means in float64, so that differences between two sets of weights keep their digits.

    Returns:
        (n,) float64: the mean over captions, timesteps and draws.
    """
    per_caption = torch.empty(len(block.owner), dtype=torch.float64, device=model.device)
    for batch in planned_batches(model, plan, block, micro_batch):
        losses = per_sample_loss(model.unet, model.scheduler, batch.clean, batch.text, batch.timesteps, batch.noise)
        check_finite(losses, batch.train_ids, batch.timesteps)
        per_caption[batch.captions] = losses.double().view(-1, batch.per_caption).mean(1)
    return block.mean_over_captions(per_caption)


def check_finite(losses: Tensor, owners: Tensor, timesteps: Tensor) -> None:
    """Raise `FloatingPointError` naming sample and timestep of the first loss that is not finite."""
    bad = (~torch.isfinite(losses)).nonzero().flatten()
    if len(bad):
        first = bad[0]
        raise FloatingPointError(
            f"loss of sample {owners[first].item()} at timestep {timesteps[first].item()} is {losses[first].item()}: "
            "check its image and caption, and the model's weights"
        )
