"""The Fisher of the layers that the unlearning step moves."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import fit_fisher
from fastgda_core.diffusion.loss import per_sample_loss, take
from fastgda_core.diffusion.noise import gaussian_noise, stream_key, uniform
from fastgda_core.interruption import checkpoint
from fastgda_core.teachers.teachers import TEACHERS
from storage_schemas.commit import Manifest, commit, input_key
from storage_schemas.files import AnyPath
from tasks.context import Context, Stage
from tasks.samples import load_block, unreadable_samples

CURVATURE_BATCH = 32


def curvature_of(context: Context, latents: Stage) -> Stage:
    """Where the teacher's Fisher lies, or will."""
    config, teacher = context.config.curvature, context.config.teacher
    key = input_key("curvature", latents.key, config, TEACHERS[teacher.name].fisher, teacher.layers)
    return Stage("curvature", key, context.workspace.curvature(key), config.samples, 0.0, True)


class CurvatureParts:
    """The teacher's Fisher over sampled (training image, eps, t): one part."""

    kind = "curvature"
    count = 1

    def __init__(self, context: Context, latents: Stage, curvature: Stage) -> None:
        self.context, self.latents, self.stage = context, latents, curvature

    def path(self, number: int) -> AnyPath:
        return self.stage.path

    def key(self, number: int) -> str:
        return self.stage.key

    def rows(self, number: int) -> int:
        return self.stage.rows

    def make(self, number: int) -> Manifest:
        context, started = self.context, time.monotonic()
        kind = TEACHERS[context.config.teacher.name].fisher
        model = context.model()
        names, dataset = _curvature_dataset(context, self.latents)

        def loss(denoiser: torch.nn.Module, batch: list[Tensor]) -> Tensor:
            checkpoint()
            clean, timesteps, noise, *condition = batch
            rows = dict(zip(names, condition, strict=True))
            return per_sample_loss(denoiser, model.schedule, clean, rows, timesteps, noise).sum()

        layers = list(context.layers(model))
        fisher = fit_fisher(kind, model.denoiser, layers, dataset, loss, CURVATURE_BATCH, context.device)
        path, key, rows = self.path(number), self.key(number), self.rows(number)
        return commit(path, fisher.save, key=key, rows=rows, started=started, device=str(context.device))


def _curvature_dataset(context: Context, latents: Stage) -> tuple[list[str], TensorDataset]:
    """Rows of latent, timestep, noise and the named conditions: random samples, timesteps spread over the schedule."""
    config, model = context.config.curvature, context.model()
    draw = random.Random(config.seed)
    population = range(latents.rows)
    if config.samples <= latents.rows:
        chosen = draw.sample(population, config.samples)
    else:
        chosen = draw.choices(population, k=config.samples)
    # Others stand in for samples that cannot be read. The Fisher stays as it is when these are mended: it is an
    # estimate over some samples, and every score of a run has to rest on the same one.
    bad = unreadable_samples(latents, population)
    good = [train_id for train_id in population if train_id not in bad]
    chosen = [draw.choice(good) if train_id in bad else train_id for train_id in chosen]
    block = load_block(context, latents, chosen)
    row = torch.arange(config.samples)
    flip = row % block.flips
    steps = model.schedule.train_timesteps
    offsets = uniform(stream_key(config.seed, "curvature timesteps"), 0, config.samples)
    timesteps = ((row + offsets) / config.samples * steps).long().clamp_(max=steps - 1)
    timesteps = timesteps[torch.randperm(config.samples, generator=torch.Generator().manual_seed(config.seed))]
    noise = gaussian_noise(stream_key(config.seed, "curvature noise"), row, timesteps, row % 2**16, model.latent_shape)
    condition: dict[str, Any] = take(block.condition, torch.nonzero(block.caption_number == 0).flatten())
    rows = [block.latents.cpu()[row, flip], timesteps, noise, *(tensor.cpu() for tensor in condition.values())]
    return list(condition), TensorDataset(*rows)
