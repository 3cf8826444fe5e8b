"""Gradients of training samples' losses, summed over a noise plan: what first-order scores and sketches are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgda_core.curvature.fisher import LayerFactors
from fastgda_core.curvature.layers import Layer, input_rows, matrix_shape
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import UsageError
from fastgda_core.teachers.gradients import output_gradients, steady_layers, weight_gradient
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.training_loss import SampleBlock, check_finite, plan_rows, row_inputs

CONTRACTED_SAMPLES = 64  # at a time: with few of them the product only waits for the updates to be read
CONTRACTED_BYTES = 2**30  # of gradients at a time
GATHERED = 64  # a coordinate by itself costs so much more than one of all


@dataclass(frozen=True)
class SampleGradients:
    """Weight gradients of some samples' losses, one for each (sample, flip, group), ready to be contracted.

    moving: (n, d_out, d_in) by layer. Of the steady layers, whose input is a function of the caption: output gradients
    (captions, flips and groups, positions, d_out) by layer, inputs (captions, positions, d_in) by the first layer that
    sees them, and the place of each (caption, flip, group) among the n.
    of_group: (groups,) the share of the draws that each group has; the gradients of all groups sum to the plan's.
    """

    moving: dict[str, Tensor]
    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    seen_by: Mapping[str, str]
    place: Tensor
    flips: int
    of_group: Tensor
    count: int

    def summed(self) -> SampleGradients:
        """Return the gradients under the whole plan, one for each (sample, flip)."""
        groups = len(self.of_group)
        if groups == 1:
            return self
        moving, outputs = (
            {name: values.unflatten(0, (-1, groups)).sum(1) for name, values in by_layer.items()}
            for by_layer in (self.moving, self.outputs)
        )
        place, whole = self.place[::groups] // groups, self.of_group.sum(0, keepdim=True)
        return replace(self, moving=moving, outputs=outputs, place=place, of_group=whole, count=self.count // groups)

    def check_steady(self, consequence: str) -> None:
        """Raise UsageError, with what follows from it, where the input of a layer moves with the timestep."""
        if self.moving:
            raise UsageError(f"the input of layer {min(self.moving)} changes with the timestep, {consequence}")

    def names(self) -> list[str]:
        return [*self.moving, *self.outputs]

    def of(self, name: str) -> Tensor:
        """Return the gradients of one layer, (n, d_out * d_in)."""
        if name in self.moving:
            return self.moving[name].flatten(1)
        # One product for each caption: its flips and groups have seen the same.
        inputs, d_out = self.inputs[self.seen_by[name]], self.outputs[name].shape[2]
        together = self.outputs[name].unflatten(0, (len(inputs), -1)).transpose(1, 2).flatten(2)
        return self._by_sample(weight_gradient(together, inputs).unflatten(1, (-1, d_out)).flatten(0, 1).flatten(1))

    def rotated(self, name: str, factors: LayerFactors, places: Tensor | None = None) -> Tensor:
        """Return coordinates of U_B^T G U_A of one layer's gradients G, (n, k).

        Args:
            name: of the layer.
            factors: its eigenbases.
            places: (k,) in the flattened (d_out, d_in); None: all.
        """
        every = slice(None) if places is None else places
        if name in self.moving:
            return factors.rotate(self.moving[name].to(factors.output_basis.dtype)).flatten(1)[:, every]
        outputs = self.outputs[name].to(factors.output_basis.dtype) @ factors.output_basis
        inputs = self.seen(name).to(factors.input_basis.dtype) @ factors.input_basis
        d_in = inputs.shape[2]
        if places is not None and len(places) * GATHERED < outputs.shape[2] * d_in:
            return self._by_sample((outputs[:, :, places // d_in] * inputs[:, :, places % d_in]).sum(1))
        return self._by_sample(weight_gradient(outputs, inputs).flatten(1)[:, every])

    def seen(self, name: str) -> Tensor:
        """Return the inputs of a steady layer, (captions, flips and groups, positions, d_in)."""
        return self.inputs[self.seen_by[name]].repeat_interleave(self.flips * len(self.of_group), dim=0)

    def _by_sample(self, values: Tensor) -> Tensor:
        """Sum what there is of each (caption, flip, group) to one row for each (sample, flip, group)."""
        if len(values) == self.count:
            return values
        return values.new_zeros(self.count, values.shape[1]).index_add_(0, self.place, values)


@torch.no_grad()
def sample_gradients(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    micro_batch: MicroBatch,
    groups: int | Tensor = 1,
) -> Iterator[SampleGradients]:
    """Yield grad L(z_i, theta_0) of the samples of a block, some at a time, in order.

    One forward and backward per row of the plan.

    Args:
        model: the frozen model at theta_0.
        layers: those whose gradients are wanted.
        plan: the noise plan.
        block: the training samples.
        micro_batch: forwards at a time.
        groups: of draws that are summed apart, at most, see `NoisePlan.groups`; or the group of each draw, (draws,).
    """
    steady = steady_layers(model, layers, block.condition, micro_batch)
    group_of = (groups if isinstance(groups, Tensor) else plan.groups(groups)).to(model.device)
    step = _samples_at_once(layers, steady, block, int(group_of[-1]) + 1)
    for start in range(0, len(block.train_ids), step):
        some = block.samples(slice(start, start + step))
        yield _sum_gradients(model, layers, steady, plan, some, micro_batch, group_of)


def _sum_gradients(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    steady: Mapping[str, str],
    plan: NoisePlan,
    block: SampleBlock,
    micro_batch: MicroBatch,
    group_of: Tensor,
) -> SampleGradients:
    """Run one forward and backward per row of the plan; sum over timesteps before any outer product where possible."""
    rows = plan_rows(model, plan, block)
    of_group = torch.bincount(group_of).double() / len(group_of)
    each = block.flips * len(of_group)
    count, captions = len(block.train_ids) * each, len(block.owner) * each
    # Every caption has its rows flip by flip and group by group, so (caption, flip, group) are stretches of rows.
    of_caption = torch.arange(captions, device=model.device)
    place = block.owner[of_caption // each] * each + of_caption % each
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
        segment = caption * each + rows.flip[stretch] * len(of_group) + group_of[rows.draw[stretch]]
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
    return SampleGradients(moving, outputs, inputs, steady, place, block.flips, of_group, count)


def _add_outer_products(sums: Tensor, place: Tensor, segment: Tensor, gradient: Tensor, seen: Tensor) -> None:
    """Add gradient^T seen, summed over the rows of each segment and over positions, at the segment's place."""
    segments, lengths = torch.unique_consecutive(segment, return_counts=True)
    first = 0
    for target, length in zip(place[segments].tolist(), lengths.tolist(), strict=True):
        stretch = slice(first, first + length)
        sums[target].addmm_(gradient[stretch].flatten(0, 1).T, seen[stretch].flatten(0, 1))
        first += length


def _samples_at_once(layers: Mapping[str, Layer], steady: Mapping[str, str], block: SampleBlock, groups: int) -> int:
    """Return how many samples' gradients are held at a time."""
    captions = int(block.captions_of().max())
    sizes = {name: 4 * matrix_shape(layer)[0] * matrix_shape(layer)[1] for name, layer in layers.items()}
    held = sum(size for name, size in sizes.items() if name not in steady)
    made = max((captions * size for name, size in sizes.items() if name in steady), default=0)
    each = block.flips * (groups + (groups > 1))  # the sum of several groups stands beside them
    return max(1, min(CONTRACTED_SAMPLES, CONTRACTED_BYTES // ((held + made) * each)))
