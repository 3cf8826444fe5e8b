"""The Fisher of the layers that the unlearning step moves."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import fit_fisher
from fastgda_core.curvature.importance import timestep_density, weighted_timesteps
from fastgda_core.curvature.layers import input_rows
from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stream_key, uniform
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.interruption import checkpoint
from fastgda_core.teachers.gradients import output_gradients, weight_gradient
from fastgda_core.teachers.registry import UNLEARNING_TEACHERS
from storage_schemas.commit import Manifest, commit, committed, input_key
from storage_schemas.files import AnyPath
from tasks.artifact import Artifact
from tasks.config.teaching import CurvatureConfig
from tasks.context import Context
from tasks.parts import Parts
from tasks.teaching.latents import load_block, unreadable_samples

CURVATURE_BATCH = 32
PILOT_ROWS, PILOT_SHARE = 256, 0.25  # at most, and at most of the rows that they are for


def curvature_of(context: Context, latents: Artifact) -> Artifact:
    """Return the artifact of the teacher's Fisher, which need not be made yet."""
    config, teacher = context.config.curvature, context.config.teacher
    fisher = UNLEARNING_TEACHERS[teacher.name].fisher
    key = input_key("curvature", latents.key, config, fisher, teacher.layers, *context.taught_at)
    folder = CurvatureParts.together(context.workspace, key, config.samples)
    return replace(folder, name=context.named(folder.name), path=folder.path / "fisher.safetensors")


def make_curvature(context: Context, latents: Artifact) -> Artifact:
    """Make the Fisher of a context, here and now, unless it is there; return its artifact."""
    stage = curvature_of(context, latents)
    parts = CurvatureParts(context, latents, stage)
    if parts.missing():
        parts.make(0)
    return stage


def _model(context: Context) -> DiffusionModel:
    """Return the model whose Fisher it is: in float32, and of the loss, whatever the teacher's objective."""
    return context.teacher_model(Precision.float32).with_objective(Objective.loss)


def pilot_rows(config: CurvatureConfig) -> int:
    """Return how many rows are looked at before the timesteps are drawn."""
    return min(PILOT_ROWS, math.ceil(PILOT_SHARE * config.samples)) if config.importance else 0


class CurvatureParts(Parts):
    """The teacher's Fisher over sampled (training image, eps, t): one part."""

    kind = title = "curvature"

    def __init__(self, context: Context, latents: Artifact, curvature: Artifact) -> None:
        self.context, self.latents, self.artifact = context, latents, curvature
        self.kind = self.title = curvature.name

    @property
    def count(self) -> int:
        return 1

    def path(self, number: int) -> AnyPath:
        return self.artifact.path

    def committed(self) -> dict[int, Manifest]:
        manifest = committed(self.artifact.path, self.artifact.key)
        return {0: manifest} if manifest else {}

    def rows(self, number: int) -> int:
        return self.artifact.rows

    def make(self, number: int) -> Manifest:
        context, config, started = self.context, self.context.config.curvature, time.monotonic()
        kind = UNLEARNING_TEACHERS[context.config.teacher.name].fisher
        model = _model(context)
        density = _density(context, self.latents) if config.importance else None
        rows = _draw_rows(context, self.latents, config.samples, "curvature", density)

        def loss(denoiser: torch.nn.Module, batch: list[Tensor]) -> Tensor:
            checkpoint()
            clean, timesteps, noise, weights, *condition = batch
            named = dict(zip(rows.condition, condition, strict=True))
            losses = per_sample_loss(denoiser, model.schedule, clean, named, timesteps, noise)
            return (losses * weights.sqrt()).sum()  # a gradient counts by its square

        layers = list(context.layers(model))
        fisher = fit_fisher(kind, model.denoiser, layers, rows.dataset(), loss, CURVATURE_BATCH, context.device)
        path, key = self.path(number), self.key(number)
        return commit(path, fisher.save, key=key, rows=config.samples, started=started, device=str(context.device))


@dataclass(frozen=True)
class _Rows:
    """(training image, eps, t) triples on the CPU, the weight of each in the mean, and the conditions by name."""

    clean: Tensor
    timesteps: Tensor
    noise: Tensor
    weights: Tensor
    condition: dict[str, Tensor]

    def dataset(self) -> TensorDataset:
        return TensorDataset(self.clean, self.timesteps, self.noise, self.weights, *self.condition.values())


def _draw_rows(context: Context, latents: Artifact, count: int, stream: str, density: Tensor | None) -> _Rows:
    """Draw random samples, with timesteps spread over the schedule evenly or by a density."""
    config, model = context.config.curvature, _model(context)
    block = load_block(context, latents, some_samples(latents, count, config.seed), captions=1)
    row = torch.arange(count)
    flip = row % block.flips
    steps = model.schedule.train_timesteps
    quantiles = (row + uniform(stream_key(config.seed, f"{stream} timesteps"), 0, count)) / count
    if density is None:
        timesteps, weights = (quantiles * steps).long().clamp_(max=steps - 1), torch.ones(count)
    else:
        timesteps, weights = weighted_timesteps(quantiles, density, steps)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    timesteps, weights = timesteps[order], weights[order]
    noise = gaussian_noise(stream_key(config.seed, f"{stream} noise"), row, timesteps, row % 2**16, model.latent_shape)
    on_cpu = {name: tensor.cpu() for name, tensor in block.condition.items()}
    return _Rows(block.latents.cpu()[row, flip], timesteps, noise, weights, on_cpu)


def some_samples(latents: Artifact, count: int, seed: int) -> list[int]:
    """Draw train_ids at random, each once where there are enough."""
    draw = random.Random(seed)
    population = range(latents.rows)
    chosen = draw.sample(population, count) if count <= latents.rows else draw.choices(population, k=count)
    # Others stand in for samples that cannot be read. The Fisher stays as it is when these are mended: it is an
    # estimate over some samples, and every score of a run has to rest on the same one.
    bad = unreadable_samples(latents, population)
    good = [train_id for train_id in population if train_id not in bad]
    return [draw.choice(good) if train_id in bad else train_id for train_id in chosen]


def _density(context: Context, latents: Artifact) -> Tensor:
    """Estimate where on the schedule gradients are large, by a pilot of a few hundred rows."""
    model = _model(context)
    layers = context.layers(model)
    count = pilot_rows(context.config.curvature)
    rows = _draw_rows(context, latents, count, "curvature pilot", None)
    device = context.device

    def squared_norms(stretch: slice) -> Tensor:
        condition = {name: tensor[stretch].to(device) for name, tensor in rows.condition.items()}
        clean, timesteps, noise = (part[stretch].to(device) for part in (rows.clean, rows.timesteps, rows.noise))
        _, seen, gradients = output_gradients(model, layers, clean, condition, timesteps, noise)
        squares = [
            weight_gradient(gradient, input_rows(layers[name], seen[name])).flatten(1).square().sum(1)
            for name, gradient in gradients.items()
        ]
        return torch.stack(squares).sum(0).cpu()

    norms = torch.cat([norms for _, norms in context.micro_batch("gradients").run(count, squared_norms)])
    return timestep_density(rows.timesteps, norms, model.schedule.train_timesteps)
