"""Factored sketches: the gradients of layers that see the caption alone, exact and short.

The gradient of such a layer is the sum over the caption's tokens of (output gradient, summed over noise) x (input). The
input is a function of the caption: the sketch is the output gradients alone, (tokens, sum of d_out).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer, input_rows
from fastgda_core.diffusion.loss import Condition, take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.teachers.gradients import layer_inputs
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import SampleGradients


@dataclass(frozen=True)
class FactoredSketch:
    """Output gradients of some samples, one matrix for each caption and flip.

    deltas: (captions and flips, tokens, sum of d_out), the layers in the order of `widths`.
    widths: d_out by layer.
    seen_by: by layer, the layer whose inputs are its inputs.
    place: (captions and flips,) the (sample, flip) of each; flips: of each sample.
    """

    deltas: Tensor
    widths: Mapping[str, int]
    seen_by: Mapping[str, str]
    place: Tensor
    flips: int

    @classmethod
    def of_samples(cls, gradients: SampleGradients) -> Self:
        """Take the sketches out of gradients.

        Raises:
            UsageError: the input of a layer moves with the timestep.
        """
        gradients.check_steady(
            "and a factored sketch is exact for layers that see the caption alone: use an eigen sketch, or "
            "teacher.layers cross-attn-kv"
        )
        widths = {name: values.shape[2] for name, values in gradients.outputs.items()}
        deltas = torch.cat(list(gradients.outputs.values()), dim=2)
        return cls(deltas, widths, gradients.seen_by, gradients.place, gradients.flips)

    def scores(self, inputs: Mapping[str, Tensor], updates: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """Return first-order scores, (queries, n) float64, the larger of the flips.

        Args:
            inputs: (captions, tokens, d_in) by layer, as of `caption_inputs` for these samples' captions.
            updates: Delta theta of some queries at a time, by layer, (queries, d_out, d_in).
        """
        parts = dict(zip(self.widths, self.deltas.split(list(self.widths.values()), dim=2), strict=True))
        count = int(self.place.max()) + 1
        scores = []
        for update in updates:
            total = torch.zeros((), dtype=torch.float64)
            for name, delta in parts.items():
                seen = inputs[self.seen_by[name]].repeat_interleave(self.flips, dim=0)
                products = torch.einsum("cpo,qoi,cpi->qc", delta, update[name].to(delta.dtype), seen.to(delta.dtype))
                total = total + products.double()
            by_place = total.new_zeros(len(total), count).index_add_(1, self.place, total)
            scores.append(by_place.view(len(total), -1, self.flips).amax(2))
        return torch.cat(scores)


class CaptionInputs:
    """`caption_inputs` of one model and some layers, for captions as they come.

    Cross-attention mostly projects the caption's embedding as it is. Where no caption and an example show that, the
    denoiser is not run for any more.
    """

    def __init__(
        self, model: DiffusionModel, layers: Mapping[str, Layer], micro_batch: MicroBatch, example: str
    ) -> None:
        self.model, self.layers, self.micro_batch = model, layers, micro_batch
        condition = model.encode_captions(["", example])
        found = caption_inputs(model, layers, condition, micro_batch)
        # By layer, the part of the condition that its input is.
        self.as_it_is = {
            name: field
            for name, inputs in found.items()
            for field, rows in condition.items()
            if torch.equal(inputs, rows.to(inputs.dtype))
        }

    def of(self, condition: Condition) -> dict[str, Tensor]:
        """Return the inputs, (captions, tokens, d_in) by layer name, for one row of the condition each."""
        if self.as_it_is.keys() == self.layers.keys():
            return {name: condition[field] for name, field in self.as_it_is.items()}
        return caption_inputs(self.model, self.layers, condition, self.micro_batch)


@torch.no_grad()
def caption_inputs(
    model: DiffusionModel, layers: Mapping[str, Layer], condition: Condition, micro_batch: MicroBatch
) -> dict[str, Tensor]:
    """Return the inputs of layers that see the caption alone, (captions, tokens, d_in) by layer name.

    Args:
        model: the frozen model.
        layers: whose inputs are wanted.
        condition: one row for each caption.
        micro_batch: forwards at a time.
    """
    captions = len(next(iter(condition.values())))
    zeros = torch.zeros(captions, *model.latent_shape, device=model.device)
    timesteps = torch.zeros(captions, dtype=torch.long, device=model.device)

    def look(stretch: slice) -> dict[str, Tensor]:
        rows = (zeros[stretch], take(condition, stretch), timesteps[stretch], zeros[stretch])
        seen = layer_inputs(model, layers, rows)
        return {name: input_rows(layer, seen[name]) for name, layer in layers.items()}

    looks = [inputs for _, inputs in micro_batch.run(captions, look)]
    return {name: torch.cat([inputs[name] for inputs in looks]) for name in layers}
