"""Scores of training samples against queries: by finite difference (exact) and to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import SampleGradients, sample_gradients
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import moved

Update = Mapping[str, Tensor]
Look = Callable[[SampleGradients], None]


def exact_scores(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    base_losses: Tensor,
    update: Update,
    micro_batch: MicroBatch,
) -> Tensor:
    """Return tau(z_hat, z_i) = L(z_i, theta_-z_hat) - L(z_i, theta_0) for one query.

    Args:
        model: the frozen model at theta_0.
        layers: those that the update moves.
        plan: the same noise plan that gave `base_losses`.
        block: the training samples.
        base_losses: L(z_i, theta_0), (n, f) float64.
        update: Delta theta of the query, by layer, (d_out, d_in).
        micro_batch: forwards at a time.

    Returns:
        (n,) float64; higher is more influential, the larger of the two flips. Design section 4, "Score".
    """
    with moved(layers, update):
        return (training_losses(model, plan, block, micro_batch) - base_losses).amax(1)


@torch.no_grad()
def first_order_scores(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    updates: Iterable[Update],
    micro_batch: MicroBatch,
    look: Look = lambda gradients: None,
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
    scores = []
    for gradients in sample_gradients(model, layers, plan, block, micro_batch):
        look(gradients)
        by_flip = torch.cat([_inner_products(gradients, update) for update in updates])
        scores.append(by_flip.view(len(by_flip), -1, gradients.flips).amax(2))
    return torch.cat(scores, dim=1)


def _inner_products(gradients: SampleGradients, update: Update) -> Tensor:
    """Return the inner products of updates and gradients, (queries, n) float64."""
    total = torch.zeros((), dtype=torch.float64)
    for name in gradients.names():
        gradient = gradients.of(name)
        product = update[name].flatten(1).to(gradient.dtype) @ gradient.T
        total = product.double() if total.ndim == 0 else total.add_(product)
    return total
