"""AbU+ scores of training samples: by finite difference (exact) and to first order."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.teachers.gradients import output_gradients, weight_gradient
from fastgda_core.teachers.training_loss import SampleBlock, check_finite, planned_batches, training_losses
from fastgda_core.teachers.unlearning import moved

CONTRACTED_CAPTIONS = 64  # at a time: with few of them the product only waits for the updates to be read


def exact_scores(
    model: DiffusionModel,
    plan: NoisePlan,
    block: SampleBlock,
    base_losses: Tensor,
    update: dict[str, Tensor],
    micro_batch: int,
) -> Tensor:
    """tau(z_hat, z_i) = L(z_i, theta_-z_hat) - L(z_i, theta_0) for one query.

    Args:
        model: the frozen model at theta_0.
        plan: the same noise plan that gave `base_losses`.
        block: the training samples.
        base_losses: L(z_i, theta_0), (n,) float64.
        update: Delta theta of the query, by layer, (d_out, d_in).
        micro_batch: forwards at a time.

    Returns:
        (n,) float64; higher is more influential. Design section 4, "Score".
    """
    with moved(model, update):
        return training_losses(model, plan, block, micro_batch) - base_losses


@torch.no_grad()
def first_order_scores(
    model: DiffusionModel, plan: NoisePlan, block: SampleBlock, updates: dict[str, Tensor], micro_batch: int
) -> Tensor:
    """<grad L(z_i, theta_0), Delta theta> of a block of samples against all queries at once.

    Args:
        model: the frozen model at theta_0.
        plan: the noise plan.
        block: the training samples.
        updates: Delta theta of every query, by layer, (queries, d_out, d_in).
        micro_batch: forwards at a time.

    Returns:
        (queries, n) float64; higher is more influential. Design section 4, "First order".
    """
    queries = len(next(iter(updates.values())))
    flat = {name: update.flatten(1) for name, update in updates.items()}
    per_caption = torch.zeros(queries, len(block.owner), dtype=torch.float64, device=model.device)
    means: defaultdict[str, list[Tensor]] = defaultdict(list)
    first = 0
    for batch in planned_batches(model, plan, block, micro_batch):
        losses, gradients = output_gradients(model, batch.clean, batch.text, batch.timesteps, batch.noise)
        check_finite(losses, batch.train_ids, batch.timesteps)
        for name, gradient in gradients.items():
            # The layer's input is the caption at every timestep: sum first, contract once.
            means[name].append(gradient.view(-1, batch.per_caption, *gradient.shape[1:]).mean(1))
        stop = batch.captions.stop
        if stop - first >= CONTRACTED_CAPTIONS or stop >= len(block.owner):
            captions = slice(first, stop)
            for name, several in means.items():
                gradient = weight_gradient(torch.cat(several), block.text[captions])
                per_caption[:, captions] += flat[name] @ gradient.flatten(1).T
            means.clear()
            first = stop
    return block.mean_over_captions(per_caption)
