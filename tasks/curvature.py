"""The Fisher of the layers that the unlearning step moves."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import fit_fisher
from fastgda_core.diffusion.loss import per_sample_loss, take
from fastgda_core.diffusion.noise import gaussian_noise, stream_key, uniform
from fastgda_core.teachers.teachers import TEACHERS
from storage_schemas.commit import commit, committed, input_key
from tasks.context import Context, Stage
from tasks.progress import stage
from tasks.samples import load_block

CURVATURE_BATCH = 32
PASSES = {"diagonal": 1, "ekfac": 2}  # over the data: Lambda alone, or A and B before it


@task(task_run_name="curvature", cache_policy=NO_CACHE)
def fit_curvature(context: Context, latents: Stage) -> Stage:
    """The teacher's Fisher over sampled (training image, eps, t)."""
    config, teacher = context.config.curvature, context.config.teacher
    kind = TEACHERS[teacher.name].fisher
    key = input_key("curvature", latents.key, config, kind, teacher.layers)
    path = context.workspace.curvature(key)
    manifest = committed(path, key)
    reused = manifest is not None
    if manifest is None:
        started = time.monotonic()
        with stage("curvature", config.samples) as advance:
            model = context.model()
            names, dataset = _curvature_dataset(context, latents)

            def loss(denoiser: torch.nn.Module, batch: list[Tensor]) -> Tensor:
                advance(len(batch[0]) / PASSES[kind])
                clean, timesteps, noise, *condition = batch
                rows = dict(zip(names, condition, strict=True))
                return per_sample_loss(denoiser, model.schedule, clean, rows, timesteps, noise).sum()

            layers = list(context.layers(model))
            fisher = fit_fisher(kind, model.denoiser, layers, dataset, loss, CURVATURE_BATCH, context.device)
        manifest = commit(path, fisher.save, key=key, rows=config.samples, started=started, device=str(context.device))
    return Stage("curvature", key, path, manifest.rows, manifest.seconds, reused)


def _curvature_dataset(context: Context, latents: Stage) -> tuple[list[str], TensorDataset]:
    """Rows of latent, timestep, noise and the named conditions: random samples, timesteps spread over the schedule."""
    config, model = context.config.curvature, context.model()
    draw = random.Random(config.seed)
    population = range(latents.rows)
    if config.samples <= latents.rows:
        chosen = draw.sample(population, config.samples)
    else:
        chosen = draw.choices(population, k=config.samples)
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
