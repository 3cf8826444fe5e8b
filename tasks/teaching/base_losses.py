"""Base losses: L(z_i, theta_0) of every training sample."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.diffusion.objective import Objective
from fastgda_core.teachers.scores import base_losses as losses_of_block
from fastgda_core.teachers.training_loss import SampleBlock, plan_rows, sample_means
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.parts import Parts
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.noise import plan_inputs, run_plan

BASE_LOSS_PART = 512


def base_losses_of(context: Context, latents: Artifact, plan: Artifact | None = None) -> Artifact:
    """Return the artifact of all samples' L(z_i, theta_0) under the noise plan, which the exact teacher subtracts.

    The artifact need not be made yet; `plan` is that of a plan which a pilot chooses.
    """
    teacher = context.config.teacher
    settings = plan_inputs(context, plan), teacher.precision, teacher.objective, *context.taught_at
    key = input_key("base losses", latents.key, *settings, table=tables.BASE_LOSSES)
    folder = BaseLossParts.together(context.workspace, key, latents.rows)
    return replace(folder, name=context.named(folder.name))


class BaseLossParts(Parts):
    """L(z_i, theta_0) of every sample under the noise plan, in parts of 512."""

    kind = title = "base losses"

    def __init__(
        self, context: Context, latents: Artifact, base_losses: Artifact, plan: Artifact | None = None
    ) -> None:
        self.context, self.latents, self.artifact, self.plan = context, latents, base_losses, plan
        self.kind = self.title = base_losses.name

    @property
    def count(self) -> int:
        return -(-self.latents.rows // BASE_LOSS_PART)

    def rows(self, number: int) -> int:
        return min(BASE_LOSS_PART, self.latents.rows - number * BASE_LOSS_PART)

    def make(self, number: int) -> Manifest:
        context, started = self.context, time.monotonic()
        first = number * BASE_LOSS_PART
        train_ids = np.arange(first, first + self.rows(number))

        objective, of_rows = context.config.teacher.objective, dict[int, list[list[float]]]()

        def losses_of(chosen: NDArray[np.int64]) -> Tensor:
            block = load_block(context, self.latents, chosen.tolist())
            model, plan = context.teacher_model(), run_plan(context, self.plan)
            losses = losses_of_block(model, plan, block, context.micro_batch("losses"))
            if objective is Objective.ratio:
                of_rows.update(zip(chosen.tolist(), _by_flip(block, losses), strict=True))
                losses = sample_means(plan_rows(model, plan, block), block, losses)
            return losses.cpu()

        known, flips = unreadable_samples(self.latents, train_ids.tolist()), context.config.model.images
        good, losses, bad = without_bad_samples(train_ids, known, losses_of, torch.empty(0, flips, dtype=torch.float64))
        whole = torch.full((len(train_ids), losses.shape[1]), torch.nan, dtype=torch.float64)
        whole[torch.from_numpy(np.isin(train_ids, good))] = losses
        table = tables.BASE_LOSSES.rows(
            train_id=np.repeat(train_ids, whole.shape[1]),
            flip=np.tile(np.arange(whole.shape[1], dtype=np.int32), len(train_ids)),
            base_loss=whole.flatten().numpy(),
            row_losses=[each for train_id in train_ids.tolist() for each in of_rows.get(train_id, [None] * flips)],
        )
        path, key, device = self.path(number), self.key(number), str(context.device)
        return commit_table(path, table, tables.BASE_LOSSES, key=key, started=started, device=device, quarantined=bad)


def _by_flip(block: SampleBlock, losses: Tensor) -> list[list[list[float]]]:
    """Return the losses of each sample by flip, then by caption, draw and timestep, from those of the plan's rows."""
    captions = block.captions_of().tolist()
    per_image = len(losses) // (len(block.owner) * block.flips)
    pieces = losses.cpu().split([count * block.flips * per_image for count in captions])
    shaped = (piece.view(-1, block.flips, per_image).transpose(0, 1) for piece in pieces)
    return [piece.flatten(1).tolist() for piece in shaped]


class BaseLosses(NamedTuple):
    """L(z_i, theta_0) of all samples, row number = train_id.

    means: (samples, f); NaN of samples that have none.
    by_row: of objective `ratio`, by flip the losses at each caption, draw and timestep of each sample; else empty.
    """

    means: Tensor
    by_row: list[NDArray[np.float64]]

    def of(self, block: SampleBlock) -> Tensor:
        """Return those of a block's samples, as the core's `base_losses` makes them."""
        chosen = block.train_ids.tolist()
        if not self.by_row:
            return self.means[chosen]
        flips, several = block.flips, zip(chosen, block.captions_of().tolist(), strict=True)
        pieces = [
            np.stack(self.by_row[flips * number : flips * (number + 1)]).reshape(flips, captions, -1)
            for number, captions in several
        ]
        return torch.from_numpy(np.concatenate([piece.swapaxes(0, 1).ravel() for piece in pieces]))


def load_base_losses(context: Context, base_losses: Artifact) -> BaseLosses:
    """Load the base losses of a run, once."""

    def load() -> BaseLosses:
        kept = tables.read_parts(base_losses.path, tables.BASE_LOSSES)
        means = torch.from_numpy(kept["base_loss"].to_numpy().copy()).view(base_losses.rows, -1)
        if kept["row_losses"].null_count == kept.num_rows:
            return BaseLosses(means, [])
        lists = kept["row_losses"].combine_chunks()
        return BaseLosses(means, np.split(lists.values.to_numpy(), lists.offsets.to_numpy()[1:-1]))

    return context.loaded.once("base losses", base_losses, load, most=len(context.at_checkpoints()))


def without_base_loss(context: Context, base_losses: Artifact, train_ids: NDArray[np.int64]) -> dict[int, str]:
    """Return which of these samples have no base loss, and why."""
    missing = load_base_losses(context, base_losses).means[torch.from_numpy(train_ids)].isnan().any(1).numpy()
    return dict.fromkeys(train_ids[missing].tolist(), "it has no base loss")
