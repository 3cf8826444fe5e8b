"""Scores of training samples against queries: by finite difference (exact) and to first order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer, input_rows, matrix_shape
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.teachers.gradients import output_gradients, steady_layers, weight_gradient
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.training_loss import (
    SampleBlock,
    check_finite,
    plan_rows,
    row_inputs,
    training_losses,
)
from fastgda_core.teachers.unlearning import moved

CONTRACTED_SAMPLES = 64  # at a time: with few of them the product only waits for the updates to be read
CONTRACTED_BYTES = 2**30  # of gradients at a time

Update = Mapping[str, Tensor]


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

    Returns:
        (queries, n) float64; higher is more influential, the larger of the two flips. Design section 4, "First order".
    """
    steady = steady_layers(model, layers, block.condition, micro_batch)
    step = _samples_at_once(layers, steady, block)
    scores = []
    for start in range(0, len(block.train_ids), step):
        part = block.samples(slice(start, start + step))
        gradients = _sum_gradients(model, layers, steady, plan, part, micro_batch)
        by_flip = torch.cat([_inner_products(gradients, update) for update in updates])
        scores.append(by_flip.view(len(by_flip), -1, block.flips).amax(2))
    return torch.cat(scores, dim=1)


@dataclass(frozen=True)
class _Gradients:
    """Weight gradients of some samples' losses, one for each (sample, flip), ready to be contracted.

    moving: (n, d_out, d_in) by layer. Of the steady layers, whose input is a function of the caption: output gradients
    (captions and flips, positions, d_out) by layer, inputs (captions, positions, d_in) by the first layer that
    sees them, and the place of each (caption, flip) among the n.
    """

    moving: dict[str, Tensor]
    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    seen_by: Mapping[str, str]
    place: Tensor
    flips: int
    count: int

    def names(self) -> list[str]:
        return [*self.moving, *self.outputs]

    def of(self, name: str) -> Tensor:
        """Return the gradients of one layer, (n, d_out * d_in)."""
        if name in self.moving:
            return self.moving[name].flatten(1)
        seen = self.inputs[self.seen_by[name]].repeat_interleave(self.flips, dim=0)
        gradient = weight_gradient(self.outputs[name], seen).flatten(1)
        if len(gradient) == self.count:
            return gradient
        return gradient.new_zeros(self.count, gradient.shape[1]).index_add_(0, self.place, gradient)


def _inner_products(gradients: _Gradients, update: Update) -> Tensor:
    """Return the inner products of updates and gradients, (queries, n) float64."""
    total = torch.zeros((), dtype=torch.float64)
    for name in gradients.names():
        gradient = gradients.of(name)
        product = update[name].flatten(1).to(gradient.dtype) @ gradient.T
        total = product.double() if total.ndim == 0 else total.add_(product)
    return total


def _sum_gradients(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    steady: Mapping[str, str],
    plan: NoisePlan,
    block: SampleBlock,
    micro_batch: MicroBatch,
) -> _Gradients:
    """Run one forward and backward per row of the plan; sum over timesteps before any outer product where possible."""
    rows = plan_rows(model, plan, block)
    count, captions = len(block.train_ids) * block.flips, len(block.owner) * block.flips
    # Every caption has its rows flip by flip, so (caption, flip) and (sample, flip) are stretches of rows.
    of_caption = torch.arange(captions, device=model.device)
    place = block.owner[of_caption // block.flips] * block.flips + of_caption % block.flips
    moving: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def gradients_of(stretch: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, seen, gradients = output_gradients(model, layers, *row_inputs(plan, block, rows, stretch))
        check_finite(losses, block.train_ids[rows.sample[stretch]], rows.timestep[stretch])
        share = rows.share[stretch][:, None, None]
        scaled = {name: (gradient * share).to(model.precision.dtype) for name, gradient in gradients.items()}
        wanted = [name for name in layers if steady.get(name, name) == name]
        return {name: input_rows(layers[name], seen[name]).to(model.precision.dtype) for name in wanted}, scaled

    for stretch, (seen, gradients) in micro_batch.run(len(rows), gradients_of):
        caption = rows.caption[stretch]
        segment = caption * block.flips + rows.flip[stretch]
        for name, values in seen.items():
            if name in steady:
                inputs.setdefault(name, values.new_empty(len(block.owner), *values.shape[1:]))[caption] = values
        for name, gradient in gradients.items():
            if name in steady:
                sums = outputs.setdefault(name, gradient.new_zeros(captions, *gradient.shape[1:]))
                sums.index_add_(0, segment, gradient)
            else:
                sums = moving.setdefault(name, gradient.new_zeros(count, *matrix_shape(layers[name])))
                _add_outer_products(sums, place, segment, gradient, seen[name])
    return _Gradients(moving, outputs, inputs, steady, place, block.flips, count)


def _add_outer_products(sums: Tensor, place: Tensor, segment: Tensor, gradient: Tensor, seen: Tensor) -> None:
    """Add gradient^T seen, summed over the rows of each segment and over positions, at the segment's place."""
    segments, lengths = torch.unique_consecutive(segment, return_counts=True)
    first = 0
    for target, length in zip(place[segments].tolist(), lengths.tolist(), strict=True):
        stretch = slice(first, first + length)
        sums[target].addmm_(gradient[stretch].flatten(0, 1).T, seen[stretch].flatten(0, 1))
        first += length


def _samples_at_once(layers: Mapping[str, Layer], steady: Mapping[str, str], block: SampleBlock) -> int:
    """Return how many samples' gradients are held at a time."""
    captions = int(block.captions_of().max())
    sizes = {name: 4 * matrix_shape(layer)[0] * matrix_shape(layer)[1] for name, layer in layers.items()}
    held = sum(size for name, size in sizes.items() if name not in steady)
    made = max((captions * size for name, size in sizes.items() if name in steady), default=0)
    return max(1, min(CONTRACTED_SAMPLES, CONTRACTED_BYTES // ((held + made) * block.flips)))
