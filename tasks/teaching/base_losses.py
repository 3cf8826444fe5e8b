"""Base losses: L(z_i, theta_0) of every training sample."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.teachers.training_loss import training_losses
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.noise import noise_plan
from tasks.teaching.parts import Parts

BASE_LOSS_PART = 512


def base_losses_of(context: Context, latents: Artifact) -> Artifact:
    """Return the artifact of all samples' L(z_i, theta_0) under the noise plan, which the exact teacher subtracts.

    The artifact need not be made yet.
    """
    teacher = context.config.teacher
    noise = noise_plan(context.config)
    settings = noise, teacher.precision, teacher.objective, *context.taught_at
    key = input_key("base losses", latents.key, *settings, table=tables.BASE_LOSSES)
    folder = BaseLossParts.together(context.workspace, key, latents.rows)
    return replace(folder, name=context.named(folder.name))


class BaseLossParts(Parts):
    """L(z_i, theta_0) of every sample under the noise plan, in parts of 512."""

    kind = title = "base losses"

    def __init__(self, context: Context, latents: Artifact, base_losses: Artifact) -> None:
        self.context, self.latents, self.artifact = context, latents, base_losses
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

        def losses_of(chosen: NDArray[np.int64]) -> Tensor:
            block = load_block(context, self.latents, chosen.tolist())
            model, plan = context.teacher_model(), noise_plan(context.config)
            return training_losses(model, plan, block, context.micro_batch("losses")).cpu()

        known, flips = unreadable_samples(self.latents, train_ids.tolist()), context.config.model.images
        good, losses, bad = without_bad_samples(train_ids, known, losses_of, torch.empty(0, flips, dtype=torch.float64))
        whole = torch.full((len(train_ids), losses.shape[1]), torch.nan, dtype=torch.float64)
        whole[torch.from_numpy(np.isin(train_ids, good))] = losses
        table = tables.BASE_LOSSES.rows(
            train_id=np.repeat(train_ids, whole.shape[1]),
            flip=np.tile(np.arange(whole.shape[1], dtype=np.int32), len(train_ids)),
            base_loss=whole.flatten().numpy(),
        )
        path, key, device = self.path(number), self.key(number), str(context.device)
        return commit_table(path, table, tables.BASE_LOSSES, key=key, started=started, device=device, quarantined=bad)


def load_base_losses(context: Context, base_losses: Artifact) -> Tensor:
    """Load L(z_i, theta_0), (samples, f), row number = train_id; NaN of samples that have none. Loaded once a run."""

    def load() -> Tensor:
        flat = tables.read_parts(base_losses.path, tables.BASE_LOSSES)["base_loss"].to_numpy().copy()
        return torch.from_numpy(flat).view(base_losses.rows, -1)

    return context.loaded.once("base losses", base_losses, load, most=len(context.at_checkpoints()))


def without_base_loss(context: Context, base_losses: Artifact, train_ids: NDArray[np.int64]) -> dict[int, str]:
    """Return which of these samples have no base loss, and why."""
    missing = load_base_losses(context, base_losses)[torch.from_numpy(train_ids)].isnan().any(1).numpy()
    return dict.fromkeys(train_ids[missing].tolist(), "it has no base loss")
