"""Losses of training samples under a noise plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.diffusion.loss import Condition, take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import NonFiniteLoss
from fastgda_core.teachers.micro_batch import MicroBatch


@dataclass(frozen=True)
class SampleBlock:
    """Training samples ready for the denoiser; a sample may own several captions.

    train_ids: (n,).
    latents: (n, f, c, h, w), f = 2 where the mirrored image counts too, else 1.
    condition: m rows, one for each caption of all samples.
    owner: (m,) ascending, the row of each caption's sample.
    caption_number: (m,), its number within the sample.
    """

    train_ids: Tensor
    latents: Tensor
    condition: Condition
    owner: Tensor
    caption_number: Tensor

    @property
    def flips(self) -> int:
        """Images of each sample: 2 where the mirrored image counts too, else 1."""
        return self.latents.shape[1]

    def captions_of(self) -> Tensor:
        """Return the number of captions of each sample, (n,)."""
        return torch.bincount(self.owner, minlength=len(self.train_ids))

    def samples(self, chosen: slice) -> SampleBlock:
        """Return some consecutive samples of the block."""
        start, stop, _ = chosen.indices(len(self.train_ids))
        first, last = torch.searchsorted(self.owner, torch.tensor([start, stop], device=self.owner.device)).tolist()
        captions = slice(first, last)
        return SampleBlock(
            self.train_ids[chosen],
            self.latents[chosen],
            take(self.condition, captions),
            self.owner[captions] - start,
            self.caption_number[captions],
        )


@dataclass(frozen=True)
class PlanRows:
    """The forwards that a block's plan asks for: row (caption, flip, draw, timestep), the last counting fastest.

    caption, sample, flip, timestep, draw: (rows,); share: (rows,) float64, the row's part in its sample's mean.
    """

    caption: Tensor
    sample: Tensor
    flip: Tensor
    timestep: Tensor
    draw: Tensor
    share: Tensor
    per_caption: int  # rows of one caption and flip

    def __len__(self) -> int:
        return len(self.caption)


def plan_rows(model: DiffusionModel, plan: NoisePlan, block: SampleBlock) -> PlanRows:
    """List the forwards that a noise plan asks for on a block, on the block's device.

    Raises:
        UsageError: the model's schedule has not the plan's timesteps.
    """
    device = block.owner.device
    values = plan.timestep_values(model.schedule.train_timesteps)
    weights = plan.timestep_weights(len(values))
    grids = torch.meshgrid(
        torch.arange(len(block.owner)),
        torch.arange(block.flips),
        torch.arange(plan.draws),
        torch.arange(len(values)),
        indexing="ij",
    )
    caption, flip, draw, step = (grid.flatten() for grid in grids)
    caption = caption.to(device)
    sample = block.owner[caption]
    per_caption = len(values) * plan.draws
    share = weights[step].to(device) / (per_caption * block.captions_of()[sample])
    return PlanRows(caption, sample, flip.to(device), values[step].to(device), draw.to(device), share, per_caption)


def row_inputs(
    plan: NoisePlan, block: SampleBlock, rows: PlanRows, stretch: slice
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Return latents, condition, timesteps and noise of some rows, as a forward takes them."""
    caption, sample, flip, timestep = (part[stretch] for part in (rows.caption, rows.sample, rows.flip, rows.timestep))
    noise = plan.noise(
        block.train_ids[sample],
        flip,
        block.caption_number[caption],
        timestep,
        rows.draw[stretch],
        tuple(block.latents.shape[2:]),
    )
    return block.latents[sample, flip], take(block.condition, caption), timestep, noise


@torch.no_grad()
def training_losses(model: DiffusionModel, plan: NoisePlan, block: SampleBlock, micro_batch: MicroBatch) -> Tensor:
    """Return L(z_i, theta) of each sample of a block under the model's present weights.

    Forwards run in float32 or better, means in float64, so that differences between two sets of weights keep their
    digits.

    Args:
        model: the frozen model.
        plan: the noise plan.
        block: the training samples.
        micro_batch: forwards at a time.

    Returns:
        (n, f) float64: the weighted mean over captions, timesteps and draws, by flip.
    """
    rows = plan_rows(model, plan, block)
    return sample_means(rows, block, losses_by_row(model, plan, block, rows, micro_batch))


def sample_means(rows: PlanRows, block: SampleBlock, values: Tensor) -> Tensor:
    """Return the weighted mean of values by row, (rows,) float64, for each sample and flip, (n, f)."""
    means = torch.zeros(len(block.train_ids) * block.flips, dtype=torch.float64, device=values.device)
    return means.index_add_(0, rows.sample * block.flips + rows.flip, values * rows.share).view(-1, block.flips)


@torch.no_grad()
def losses_by_row(
    model: DiffusionModel, plan: NoisePlan, block: SampleBlock, rows: PlanRows, micro_batch: MicroBatch
) -> Tensor:
    """Return the loss at each row of a plan.

    Args:
        model: the frozen model.
        plan: the noise plan.
        block: the training samples.
        rows: of the plan on this block.
        micro_batch: forwards at a time.

    Returns:
        (rows,) float64.
    """

    def losses_of(stretch: slice) -> Tensor:
        losses = model.losses(*row_inputs(plan, block, rows, stretch))
        check_finite(losses, block.train_ids[rows.sample[stretch]], rows.timestep[stretch])
        return losses

    return torch.cat([losses.double() for _, losses in micro_batch.run(len(rows), losses_of)])


def check_finite(losses: Tensor, owners: Tensor, timesteps: Tensor) -> None:
    """Raise `NonFiniteLoss` with the samples whose loss is not finite, naming the first one and its timestep."""
    bad = (~torch.isfinite(losses)).nonzero().flatten()
    if len(bad):
        first = bad[0]
        raise NonFiniteLoss(
            f"loss of sample {owners[first].item()} at timestep {timesteps[first].item()} is {losses[first].item()}: "
            "check its image and caption, and the model's weights",
            owners[bad].unique().tolist(),
        )
