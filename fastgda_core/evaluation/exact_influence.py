"""Exact influence: how a query's final loss changes with the weight of each training sample, through a whole training.

A training by the built-in recipe is a function of the weights of its samples' losses, 1 each. Its derivative is taken
backwards, one step at a time, from the states that the training really had: the gradient of the loss, clipping, AdamW
with its moments, the learning rate's schedule and the averaged weights. What one training with these very draws does to
a query is known so to first order; other draws are other trainings.

Source: Ilyas and Engstrom, "MAGIC: near-optimal data attribution for deep learning" (arXiv 2504.16430), and Engstrom et
al., "Optimizing ML training with metagradient descent" (2025), for the replay of segments from stored states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.training import BETAS, LARGEST_NORM, DenoiserTrainer
from fastgda_core.interruption import checkpoint

EPSILON = 1e-8  # of torch's AdamW


@dataclass(frozen=True)
class Weights:
    """A training's weights and moments, or a derivative with respect to them; (weights,) each, or rows of them."""

    theta: Tensor
    first: Tensor
    second: Tensor

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.theta, self.first, self.second


@dataclass(frozen=True)
class Moment:
    """Where a training stands before a step: its weights, and the state of the generator that the batch comes from."""

    step: int
    weights: Weights
    draw: Tensor


def exact_influence(
    trainer: DenoiserTrainer,
    gradients_of: Callable[[Any], Tensor],
    on_step: Callable[[int, Tensor], None] = lambda step, norms: None,
) -> Tensor:
    """Train, and return minus the derivative of each query's final loss by each sample's weight.

    A sample's weight multiplies its loss wherever the training draws it; the mean is over the whole batch as before.
    The training is run twice, with a state kept every sqrt(steps), and each query then takes about as long as a
    training.

    Args:
        trainer: a training that has not begun; it is run to its end. Its denoiser draws nothing (no dropout).
        gradients_of: from the averaged model to the gradient of each query's loss by its weights, in the order of its
            parameters, (queries, weights).
        on_step: called after each step backwards with its number and the norms of the derivatives of the queries'
            losses by the weights before it, (queries,): they tell a training through which nothing can be
            differentiated.

    Returns:
        (queries, samples) float64; higher = more influential: without the sample the query would lose more.
    """
    every = max(1, math.isqrt(trainer.training.steps))
    states = []
    while trainer.step < trainer.training.steps:
        states.append(copy.deepcopy(trainer.state()))
        trainer.run(trainer.step + every)
    of_average = gradients_of(trainer.ema)  # of the averaged weights after the step at hand
    nothing = torch.zeros_like(of_average)
    of_weights = Weights(nothing, nothing.clone(), nothing.clone())
    found = torch.zeros(len(of_average), len(trainer.data.latents), dtype=torch.float64)
    for state in reversed(states):
        for moment in reversed(list(_moments(trainer, state, every))):
            checkpoint()
            kept = trainer.training.averaged(moment.step)
            of_theta = of_weights.theta + (1 - kept) * of_average
            of_average = kept * of_average
            of_after = Weights(of_theta, of_weights.first, of_weights.second)
            of_weights, of_samples = _back(trainer, moment, of_after)
            found += of_samples
            on_step(moment.step, (of_weights.theta + of_average).norm(dim=1))
    return -found


def _moments(trainer: DenoiserTrainer, state: dict[str, Any], count: int) -> Iterator[Moment]:
    """Yield where the training stood before each of some steps from a state on, in order."""
    trainer.restore(state)
    for step in range(trainer.step, min(trainer.step + count, trainer.training.steps)):
        now = trainer.state()
        theta = _flat(list(trainer.denoiser.parameters()))
        moments = now["optimizer"]["state"]
        both = [
            _flat([moments[number][name] for number in sorted(moments)]) if moments else torch.zeros_like(theta)
            for name in ("exp_avg", "exp_avg_sq")
        ]
        yield Moment(step, Weights(theta, *both), now["draw"].clone())
        trainer.run(step + 1)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


def _back(trainer: DenoiserTrainer, before: Moment, of_after: Weights) -> tuple[Weights, Tensor]:
    """Return derivatives by what a training was before a step, and by its samples' weights, from those after it.

    Args:
        of_after: of each query's loss, (queries, weights) each.

    Returns:
        of (queries, weights) each, and (queries, samples) float64 on the CPU.
    """
    theta = before.weights.theta.clone().requires_grad_(True)
    weights = torch.ones(len(trainer.data.latents), dtype=theta.dtype, device=theta.device, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
        (gradient,) = torch.autograd.grad(_loss(trainer, before, theta, weights), theta, create_graph=True)
        rows: list[tuple[Tensor, ...]] = []
        of_samples = []
        for of_one in zip(*of_after.all, strict=True):
            inputs = [each.detach().requires_grad_(True) for each in (*before.weights.all, gradient)]
            after = updated(trainer, before.step, Weights(*inputs[:3]), inputs[3])
            *of_before, of_gradient = torch.autograd.grad(after.all, inputs, of_one)
            through, by_sample = torch.autograd.grad(gradient, (theta, weights), of_gradient, retain_graph=True)
            rows.append((of_before[0] + through, *of_before[1:]))
            of_samples.append(by_sample)
    return Weights(*map(torch.stack, zip(*rows, strict=True))), torch.stack(of_samples).double().cpu()


def _loss(trainer: DenoiserTrainer, at: Moment, theta: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of the step's batch, each sample's times its weight."""
    batch = trainer.batch(_generator(at.draw))
    named = dict(trainer.denoiser.named_parameters())
    pieces = theta.split([each.numel() for each in named.values()])
    given = {name: piece.view_as(parameter) for (name, parameter), piece in zip(named.items(), pieces, strict=True)}

    def denoiser(*inputs: object, **how: object) -> Any:
        return functional_call(trainer.denoiser, given, inputs, how)

    kind = theta.dtype
    condition = {name: each.to(kind) if each.is_floating_point() else each for name, each in batch.condition.items()}
    losses = per_sample_loss(
        denoiser, trainer.schedule, batch.clean.to(kind), condition, batch.timesteps, batch.noise.to(kind)
    )
    return (weights[batch.image.to(weights.device)] * losses).mean()


def _generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def updated(trainer: DenoiserTrainer, step: int, before: Weights, gradient: Tensor) -> Weights:
    """Return what a step of the trainer's optimiser makes of weights and moments, differentiable in all of them.

    Clipping as of torch.nn.utils.clip_grad_norm_, then AdamW (Loshchilov and Hutter, 2019) as of torch.optim.
    """
    training = trainer.training
    clipped = gradient * (LARGEST_NORM / (gradient.norm() + 1e-6)).clamp(max=1)
    rate, (beta, gamma) = training.learning_rate * training.share_of_rate(step), BETAS
    first = beta * before.first + (1 - beta) * clipped
    second = gamma * before.second + (1 - gamma) * clipped.square()
    # The root's slope at 0 is infinite; there the gradient is 0, and the moments with it.
    seen = second > 0
    root = torch.where(seen, second, 1).sqrt() * seen
    length = root / math.sqrt(1 - gamma ** (step + 1)) + EPSILON
    theta = (1 - rate * training.weight_decay) * before.theta - rate / (1 - beta ** (step + 1)) * first / length
    return Weights(theta, first, second)
