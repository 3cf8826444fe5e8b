"""MUCS: a query is unlearned by many small steps of bounded ascent, beside a loss that retains training images.

Source: Serra et al., "Training data attribution in diffusion models via mirrored unlearning and noise-consistent skew"
(arXiv 2605.17938), with the settings of its release, sony/mucs. docs/teachers.md names what is different here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer, matrix_shape
from fastgda_core.diffusion.loss import Condition, concatenate, take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import stratified_timesteps, stream_key
from fastgda_core.diffusion.objective import Objective
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.training_loss import SampleBlock, check_finite

TOLERANCE = 0.05  # sony/mucs: the ascent ends where the query's loss is at 95 % of an untrained model's
WEIGHT_DECAY = 0.01  # of AdamW, as in all trainings of sony/mucs
NULL_ROWS = 2000  # forwards of the untrained model: they know its mean to less than 1 %


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Settings of `unlearn`.

    learning_rate: of AdamW; a tenth of the training's.
    forget_weight: of the query's loss, beside 1 for the retained images.
    null_loss: of an untrained model, beyond which no forward of the query is pushed.
    rows: forwards of the query in a step, and as many of retained images.
    most_steps: the ascent ends after so many, wherever it is.
    seed: of all that is drawn.
    """

    learning_rate: float
    forget_weight: float
    null_loss: float
    rows: int
    most_steps: int
    seed: int


@dataclass(frozen=True)
class Unlearned:
    """A model without a query.

    update: the change of the weights, by layer name, (d_out, d_in), 0 in the column of a bias.
    steps: that were taken.
    forget_loss: the mean over the last forwards of the query of the bounded loss.
    reached: it is as high as it was to become.
    """

    update: dict[str, Tensor]
    steps: int
    forget_loss: float
    reached: bool


@dataclass(frozen=True)
class _Rows:
    """Forwards, on the model's device; owners: numbers by which errors name them."""

    clean: Tensor
    condition: Condition
    timesteps: Tensor
    noise: Tensor
    owners: Tensor


def unlearn(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    retained: SampleBlock,
    latent: Tensor,
    condition: Condition,
    ascent: Ascent,
    *,
    owner: int,
    micro_batch: MicroBatch,
) -> Unlearned:
    """Raise the loss of a query step by step, up to that of an untrained model, while training images keep theirs.

    A step of AdamW on l_retain - forget_weight x mean of min(l_forget, null_loss): the mean loss of random training
    images and the bounded losses of the query, each at random timesteps and noise. A forward of the query whose loss is
    at the bound has no gradient. The ascent ends before the step at whose rows the mean of the bounded losses is 95 %
    of the bound. Only the weights of the chosen layers move, not their biases; the model itself is left as it is.

    Args:
        model: the frozen model.
        layers: of the model's denoiser, whose weights move.
        retained: the training images.
        latent: of the generated image, (c, h, w).
        condition: of its caption, one row.
        ascent: settings.
        owner: a number that stands for the query; with the seed it decides all that is drawn.
        micro_batch: forwards at a time.

    Raises:
        NonFiniteLoss: a loss is no number.
    """
    plain, denoiser = model.with_objective(Objective.loss), copy.deepcopy(model.denoiser)
    weights = {name: denoiser.get_submodule(name).weight.requires_grad_(True) for name in layers}
    optimizer = torch.optim.AdamW(weights.values(), lr=ascent.learning_rate, weight_decay=WEIGHT_DECAY)
    draw = torch.Generator().manual_seed(stream_key(ascent.seed, f"MUCS {owner}")[0])
    images = _images(len(retained.train_ids), ascent.rows, draw)
    steps = 0
    while True:
        kept = _retained_rows(model, retained, next(images), draw)
        forgotten = _query_rows(model, latent, condition, ascent.rows, owner, draw)
        forget_loss, gradients = _gradients(
            plain, denoiser, list(weights.values()), kept, forgotten, ascent, micro_batch
        )
        reached = forget_loss >= (1 - TOLERANCE) * ascent.null_loss
        if reached or steps == ascent.most_steps:
            return Unlearned(_changes(layers, weights), steps, forget_loss, reached)
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        steps += 1


@torch.no_grad()
def untrained_loss(
    model: DiffusionModel, untrained: Any, retained: SampleBlock, *, seed: int, micro_batch: MicroBatch
) -> float:
    """Return the mean loss of a denoiser that has learned nothing, over random images, timesteps and noise.

    Args:
        model: whose schedule and precision it shares.
        untrained: the denoiser, with fresh weights.
        retained: the training images.
        seed: of what is drawn.
        micro_batch: forwards at a time.
    """
    draw = torch.Generator().manual_seed(stream_key(seed, "MUCS untrained")[0])
    plain, rows = model.with_objective(Objective.loss), _null_rows(model, retained, seed, draw)
    denoiser = untrained.eval().to(model.precision.dtype)

    def losses_of(stretch: slice) -> Tensor:
        losses = plain.losses(*_inputs(rows, stretch), denoiser=denoiser)
        check_finite(losses, rows.owners[stretch], rows.timesteps[stretch])
        return losses.double()

    return torch.cat([losses for _, losses in micro_batch.run(NULL_ROWS, losses_of)]).mean().item()


def _images(count: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of images without end, each image once before any comes again, as a shuffled loader does."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=draw)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def _retained_rows(model: DiffusionModel, retained: SampleBlock, images: Tensor, draw: torch.Generator) -> _Rows:
    """Return a forward of each of these images, with one of its captions, mirrored or not where that counts."""
    count, steps = len(images), model.schedule.train_timesteps
    captions_of = retained.captions_of().cpu()
    first = torch.cumsum(captions_of, 0) - captions_of
    caption = first[images] + (torch.rand(count, generator=draw) * captions_of[images]).long()
    flip = torch.randint(retained.flips, (count,), generator=draw)
    timesteps = torch.randint(steps, (count,), generator=draw)
    noise = torch.randn(count, *retained.latents.shape[2:], generator=draw)
    images, caption, flip = (rows.to(retained.latents.device) for rows in (images, caption, flip))
    clean, owners = retained.latents[images, flip], retained.train_ids[images]
    return _Rows(clean, take(retained.condition, caption), timesteps.to(clean.device), noise.to(clean.device), owners)


def _null_rows(model: DiffusionModel, retained: SampleBlock, seed: int, draw: torch.Generator) -> _Rows:
    """Return forwards of random images whose timesteps are spread over the schedule."""
    images = torch.randint(len(retained.train_ids), (NULL_ROWS,), generator=draw)
    rows = _retained_rows(model, retained, images, draw)
    key = stream_key(seed, "MUCS untrained")
    spread = stratified_timesteps(key, 0, NULL_ROWS, model.schedule.train_timesteps)
    return _Rows(rows.clean, rows.condition, spread.to(rows.clean.device), rows.noise, rows.owners)


def _query_rows(
    model: DiffusionModel, latent: Tensor, condition: Condition, count: int, owner: int, draw: torch.Generator
) -> _Rows:
    timesteps = torch.randint(model.schedule.train_timesteps, (count,), generator=draw)
    noise = torch.randn(count, *latent.shape, generator=draw)
    return _Rows(
        latent.expand(count, *latent.shape),
        {name: row.expand(count, *row.shape[1:]) for name, row in condition.items()},
        timesteps.to(latent.device),
        noise.to(latent.device),
        torch.full((count,), owner, device=latent.device),
    )


def _gradients(
    model: DiffusionModel,
    denoiser: Any,
    weights: list[Tensor],
    kept: _Rows,
    forgotten: _Rows,
    ascent: Ascent,
    micro_batch: MicroBatch,
) -> tuple[float, list[Tensor]]:
    """Return the mean of the query's bounded losses, and the gradient of what a step lowers, by weight."""
    rows = _Rows(
        torch.cat([kept.clean, forgotten.clean]),
        concatenate([dict(kept.condition), dict(forgotten.condition)]),
        *(torch.cat([getattr(kept, name), getattr(forgotten, name)]) for name in ("timesteps", "noise", "owners")),
    )
    first = len(kept.owners)  # of the query's rows
    share = torch.full((len(rows.owners),), 1 / first, dtype=torch.float64, device=rows.clean.device)
    share[first:] = -ascent.forget_weight / len(forgotten.owners)
    bound = torch.full_like(share, torch.inf)
    bound[first:] = ascent.null_loss

    def of_stretch(stretch: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            losses = model.losses(*_inputs(rows, stretch), denoiser=denoiser)
            check_finite(losses, rows.owners[stretch], rows.timesteps[stretch])
            bounded = torch.minimum(losses, bound[stretch].to(losses))
            gradients = torch.autograd.grad((bounded * share[stretch].to(losses)).sum(), weights)
        return bounded.detach().double(), gradients

    losses, total = [], [torch.zeros_like(weight) for weight in weights]
    for _, (bounded, gradients) in micro_batch.run(len(share), of_stretch):
        losses.append(bounded)
        for whole, part in zip(total, gradients, strict=True):
            whole.add_(part)
    return torch.cat(losses)[first:].mean().item(), total


def _inputs(rows: _Rows, stretch: slice) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    return rows.clean[stretch], take(rows.condition, stretch), rows.timesteps[stretch], rows.noise[stretch]


@torch.no_grad()
def _changes(layers: Mapping[str, Layer], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return how far the weights are from the layers' own, as matrices that `unlearning.moved` takes."""
    changes = {}
    for name, weight in weights.items():
        change = (weight - layers[name].weight).flatten(1)
        whole = change.new_zeros(matrix_shape(layers[name]))
        whole[:, : change.shape[1]] = change
        changes[name] = whole
    return changes
