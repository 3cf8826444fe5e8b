"""Scores of training samples against queries: by finite difference (exact) and to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Scores:
    """Scores of some samples against some queries, in the groups of the noise plan's draws that they are sums of.

    parts: (queries, n, groups) float64; of_group: (groups,) the share of the draws that each group has.
    """

    parts: Tensor
    of_group: Tensor

    @classmethod
    def whole(cls, values: Tensor) -> Scores:
        """Return scores, (queries, n) float64, of whose draws no more than their mean is known."""
        return cls(values[..., None], torch.ones(1, device=values.device))

    @property
    def values(self) -> Tensor:
        """The scores, (queries, n)."""
        return self.parts.sum(-1)

    @property
    def errors(self) -> Tensor:
        """The standard errors over the draws, (queries, n); NaN where there is but one group.

        A group with the share W of the draws has a part of mean W S and variance W Var(S), so the sum over groups of
        (part - W S)^2 / W has mean (groups - 1) Var(S).
        """
        values = self.values
        if len(self.of_group) == 1:
            return torch.full_like(values, torch.nan)
        squares = (self.parts - values[..., None] * self.of_group).square() / self.of_group
        return (squares.sum(-1) / (len(self.of_group) - 1)).sqrt()


def standardised_sum(several: Sequence[Scores], spreads: Sequence[Tensor]) -> Scores:
    """Return the sum of scores at several checkpoints under one noise plan, each divided by its spread.

    The draws of a group are the same at all checkpoints, so the groups add up, and their errors are the sum's.

    Args:
        several: of the same queries and samples.
        spreads: `unlearning.expected_spread` of each query's step at each checkpoint, (queries,).
    """
    parts = torch.stack(
        [scores.parts / spread.to(scores.parts)[:, None, None] for scores, spread in zip(several, spreads, strict=True)]
    )
    return Scores(parts.sum(0), several[0].of_group)


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
        parts = parts.view(len(parts), -1, some.flips, len(some.of_group))
        flip = parts.sum(-1).max(2, keepdim=True).indices
        found.append(parts.gather(2, flip[..., None].expand(-1, -1, 1, parts.shape[3])).squeeze(2))
        of_group = some.of_group
    return Scores(torch.cat(found, dim=1), of_group)


def _inner_products(gradients: SampleGradients, update: Update) -> Tensor:
    """Return the inner products of updates and gradients, (queries, n) float64."""
    total = torch.zeros((), dtype=torch.float64)
    for name in gradients.names():
        gradient = gradients.of(name)
        product = update[name].flatten(1).to(gradient.dtype) @ gradient.T
        total = product.double() if total.ndim == 0 else total.add_(product)
    return total
