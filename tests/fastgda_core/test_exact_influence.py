"""Derivatives through a training, against trainings of weighted samples by torch's own optimiser in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from fastgda_core.diffusion import training
from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.training import CaptionedLatents, DenoiserTrainer, DenoiserTraining
from fastgda_core.evaluation.exact_influence import exact_influence

QUERIES = 2
# Gradients are clipped in some steps and not in others; the rate rises for three steps and falls for six.
TRAINING = DenoiserTraining(steps=9, batch_size=4, learning_rate=3e-3, warmup_steps=3, ema_decay=0.6, seed=3)


class LinearDenoiser(torch.nn.Module):
    """Paints W [noisy latent; mean of the caption's tokens; 1]: no weight's gradient is always next to 0."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.weights = torch.nn.Parameter(0.1 * torch.randn(inputs, outputs, generator=draw, dtype=torch.float64))

    def forward(self, noisy: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **others: object) -> Any:
        one = torch.ones(len(noisy), 1, dtype=noisy.dtype)
        seen = torch.cat([noisy.flatten(1), encoder_hidden_states.mean(1), one], dim=1)
        return ((seen @ self.weights).view_as(noisy),)


class World:
    """A denoiser in float64, its data, and queries: noise that is laid over two of the samples."""

    def __init__(
        self, model: DiffusionModel, denoiser: torch.nn.Module, shape: tuple[int, ...], samples: int, **how: Any
    ) -> None:
        draw = torch.Generator().manual_seed(1)
        self.schedule, self.training = model.schedule, replace(TRAINING, **how)
        self.denoiser = denoiser.double().requires_grad_(True)
        latents = torch.randn(samples, *shape, generator=draw)
        captions = [chr(97 + number) for number in range(samples)]
        words = model.encode_captions(captions)
        self.data = CaptionedLatents(latents, words, torch.arange(samples), model.encode_captions([""]))
        self.noise = torch.randn(QUERIES, *shape, generator=draw)
        self.condition = {name: rows[:QUERIES] for name, rows in words.items()}
        self.norms: list[float] = []  # of gradients, before they are clipped

    def trainer(self) -> DenoiserTrainer:
        return DenoiserTrainer(copy.deepcopy(self.denoiser), self.schedule, self.data, self.training)

    def of_queries(self, denoiser: Any) -> Tensor:
        clean, timesteps = self.data.latents[:QUERIES], torch.tensor([20, 60])
        return in_float64(denoiser, self.schedule, clean, self.condition, timesteps, self.noise)

    def gradients(self, denoiser: Any) -> Tensor:
        free = copy.deepcopy(denoiser).requires_grad_(True)
        weights = list(free.parameters())
        found = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in self.of_queries(free)]
        return torch.stack([torch.cat([each.flatten() for each in one]) for one in found])

    def trained(self, weights: Tensor) -> Tensor:
        """The queries' losses after a training whose samples have weights, by torch's optimiser: (queries,)."""
        how, denoiser = self.training, copy.deepcopy(self.denoiser)
        ema = copy.deepcopy(denoiser)
        optimizer = torch.optim.AdamW(denoiser.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
        draw, batches = torch.Generator().manual_seed(how.seed), self.trainer()
        for step in range(how.steps):
            batch = batches.batch(draw)
            losses = in_float64(denoiser, self.schedule, batch.clean, batch.condition, batch.timesteps, batch.noise)
            optimizer.zero_grad()
            (weights[batch.image] * losses).mean().backward()
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)))
            share = min(1.0, (step + 1) / how.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / how.steps))
            optimizer.param_groups[0]["lr"] = how.learning_rate * share
            optimizer.step()
            kept = min(how.ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, now in zip(ema.parameters(), denoiser.parameters(), strict=True):
                    mean.mul_(kept).add_(now, alpha=1 - kept)
        with torch.no_grad():
            return self.of_queries(ema)

    def changes(self, share: float) -> Tensor:
        """How much more the queries lose with so much less of each sample, (queries, samples)."""
        every = torch.ones(len(self.data.latents), dtype=torch.float64)
        before = self.trained(every)
        less = every - share * torch.eye(len(every), dtype=torch.float64)
        return torch.stack([self.trained(weights) - before for weights in less], dim=1)

    def slopes(self) -> Tensor:
        """The same in the limit, (queries, samples)."""
        tiny = 1e-7  # AdamW turns the sign of a step where the gradient is next to 0, and some are
        return (self.changes(tiny) - self.changes(-tiny)) / (2 * tiny)


def in_float64(
    denoiser: Any, schedule: Any, clean: Tensor, condition: dict[str, Tensor], timesteps: Tensor, noise: Tensor
) -> Tensor:
    words = {name: each.double() for name, each in condition.items()}
    return per_sample_loss(denoiser, schedule, clean.double(), words, timesteps, noise.double())


@pytest.fixture(autouse=True)
def trains_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's data are in float32; its steps are taken in float64 here."""
    monkeypatch.setattr(training, "per_sample_loss", in_float64)


def test_a_derivative_is_the_limit_of_trainings_with_a_little_less_of_a_sample(tiny_model: DiffusionModel) -> None:
    world = World(tiny_model, copy.deepcopy(tiny_model.denoiser), tiny_model.latent_shape, samples=4)
    norms: list[Tensor] = []
    found = exact_influence(world.trainer(), world.gradients, lambda step, each: norms.append(each))
    torch.testing.assert_close(found, world.slopes(), rtol=1e-3, atol=1e-7)
    assert min(world.norms) < 1 < max(world.norms)
    assert len(norms) == world.training.steps and bool((torch.stack(norms) > 0).all())


def test_it_predicts_what_leaving_a_sample_out_does(tiny_model: DiffusionModel) -> None:
    world = World(
        tiny_model, LinearDenoiser(4 + 16 + 1, 4), (1, 2, 2), samples=20, steps=60, batch_size=64, learning_rate=0.02
    )
    found = exact_influence(world.trainer(), world.gradients)
    torch.testing.assert_close(found, world.slopes(), rtol=1e-3, atol=1e-7)
    for influence, truth in zip(found.tolist(), world.changes(1).tolist(), strict=True):
        assert stats.pearsonr(influence, truth).statistic > 0.95
