"""Scores of training samples against queries: by finite difference (exact) and to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.objective import RATIO_EPSILON, Objective
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import SampleGradients, sample_gradients
from fastgda_core.teachers.training_loss import (
    SampleBlock,
    losses_by_row,
    plan_rows,
    sample_means,
    training_losses,
)
from fastgda_core.teachers.unlearning import moved

Update = Mapping[str, Tensor]
Look = Callable[[SampleGradients], None]
GROUPS = 4  # of a sample's draws at most; benchmarks/RESULTS.md, "The noise of a score"


class Scores(NamedTuple):
    """Scores of some samples against some queries and how sure they are, (queries, n) float64 each.

    errors: standard errors over the noise plan's draws; NaN where nothing is known of them.
    """

    values: Tensor
    errors: Tensor


def base_losses(model: DiffusionModel, plan: NoisePlan, block: SampleBlock, micro_batch: MicroBatch) -> Tensor:
    """Return what exact scores compare with: L(z_i, theta_0) by flip, (n, f) float64.

    Of the objective `ratio`, whose score is a mean of ratios, it is the loss at each row of the plan, (rows,).
    """
    if model.objective is Objective.ratio:
        plain = model.with_objective(Objective.loss)
        return losses_by_row(plain, plan, block, plan_rows(model, plan, block), micro_batch)
    return training_losses(model, plan, block, micro_batch)


def exact_scores(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    base: Tensor,
    update: Update,
    micro_batch: MicroBatch,
) -> Tensor:
    """Return tau(z_hat, z_i) = L(z_i, theta_-z_hat) - L(z_i, theta_0) for one query.

    Of the objective `ratio` it is the mean over the plan's rows of (L_u - L_0) / (L_u + L_0 + epsilon), with the losses
    at one row after and before the step.

    Args:
        model: the frozen model at theta_0.
        layers: those that the update moves.
        plan: the same noise plan that gave the base losses.
        block: the training samples.
        base: of the function `base_losses`.
        update: Delta theta of the query, by layer, (d_out, d_in).
        micro_batch: forwards at a time.

    Returns:
        (n,) float64; higher is more influential, the larger of the two flips. Design section 4, "Score".
    """
    with moved(layers, update):
        after = base_losses(model, plan, block, micro_batch)
    if model.objective is Objective.ratio:
        ratios = (after - base) / (after + base + RATIO_EPSILON)
        return sample_means(plan_rows(model, plan, block), block, ratios).amax(1)
    return (after - base).amax(1)


@torch.no_grad()
def first_order_scores(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    updates: Iterable[Update],
    micro_batch: MicroBatch,
    look: Look | None = None,
) -> Tensor:
    """Return <grad L(z_i, theta_0), Delta theta> of a block of samples against all queries at once.

    Args:
        model: the frozen model at theta_0.
        layers: those that the updates move.
        plan: the noise plan.
        block: the training samples.
        updates: Delta theta of some queries at a time, by layer, (queries, d_out, d_in); gone through once for every
            `CONTRACTED_SAMPLES`.
        micro_batch: forwards at a time.
        look: called with the gradients of some samples at a time, in order, which no other pass need make then.

    Returns:
        (queries, n) float64; higher is more influential, the larger of the two flips. Design section 4, "First order".
    """
    return _contracted(sample_gradients(model, layers, plan, block, micro_batch), updates, look).values


@torch.no_grad()
def first_order_scores_and_errors(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    updates: Iterable[Update],
    micro_batch: MicroBatch,
    look: Look | None = None,
) -> Scores:
    """Return `first_order_scores`, and standard errors from the spread of at most `GROUPS` groups of the plan's draws.

    The errors are NaN where the plan has one draw a timestep, or one antithetic pair. With flips they are those of the
    flip that is the larger.
    """
    return _contracted(sample_gradients(model, layers, plan, block, micro_batch, GROUPS), updates, look)


@torch.no_grad()
def scores_by_draw(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    updates: Iterable[Update],
    micro_batch: MicroBatch,
) -> Tensor:
    """Return `first_order_scores` of each draw of the plan by itself and of both flips, (queries, n, f, draws)."""
    found = []
    for some in sample_gradients(model, layers, plan, block, micro_batch, torch.arange(plan.draws)):
        parts = torch.cat([_inner_products(some, update) for update in updates])
        found.append(parts.view(len(parts), -1, some.flips, plan.draws).cpu() * plan.draws)
    return torch.cat(found, dim=1)


def _contracted(gradients: Iterable[SampleGradients], updates: Iterable[Update], look: Look | None) -> Scores:
    """Contract the gradients of some samples at a time with all updates."""
    found = []
    for some in gradients:
        if look is not None:
            look(some.summed())
        parts = torch.cat([_inner_products(some, update) for update in updates])
        scores, errors = _sums_and_errors(parts.view(len(parts), -1, some.flips, len(some.of_group)), some.of_group)
        largest, flip = scores.max(2, keepdim=True)
        found.append((largest.squeeze(2), errors.gather(2, flip).squeeze(2)))
    return Scores(*(torch.cat(several, dim=1) for several in zip(*found, strict=True)))


def _sums_and_errors(parts: Tensor, of_group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over groups and their standard errors, each (...), of the groups' parts, (..., groups).

    A group with the share W of the draws has a part of mean W S and variance W Var(S), so the sum over groups of
    (part - W S)^2 / W has mean (groups - 1) Var(S).
    """
    sums = parts.sum(-1)
    if len(of_group) == 1:
        return sums, torch.full_like(sums, torch.nan)
    squares = (parts - sums[..., None] * of_group).square() / of_group
    return sums, (squares.sum(-1) / (len(of_group) - 1)).sqrt()


def _inner_products(gradients: SampleGradients, update: Update) -> Tensor:
    """Return the inner products of updates and gradients, (queries, n) float64."""
    total = torch.zeros((), dtype=torch.float64)
    for name in gradients.names():
        gradient = gradients.of(name)
        product = update[name].flatten(1).to(gradient.dtype) @ gradient.T
        total = product.double() if total.ndim == 0 else total.add_(product)
    return total
