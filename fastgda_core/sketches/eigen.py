"""Eigen sketches: the coordinates of a gradient, seen in the Fisher's eigenbasis, that scores rest on most.

With g the gradient of a sample and q that of a query, both as U_B^T G U_A in the basis of EK-FAC (George et al., 2018),
a first-order score is (alpha / N) sum_p q_p g_p / (lambda_p + damping). A sketch keeps K coordinates of
g_p / sqrt(lambda_p + damping), and the score is an inner product of two sketches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher, LayerFactors
from fastgda_core.teachers.sample_gradients import SampleGradients

Moments = Mapping[str, Tensor]  # mean squared coordinates by layer, (d_out * d_in,) float64


@dataclass(frozen=True)
class EigenSketch:
    """The coordinates that are kept, those with most energy first, so that the first few make a smaller sketch.

    fisher: whose eigenbasis it is.
    names: of the layers.
    layer: (K,) number of each coordinate's layer; place: (K,) in the layer's flattened (d_out, d_in).
    scale: (K,) float32, 1 / sqrt(lambda + damping).
    energy_kept: share of the energy of all coordinates.
    """

    fisher: EkfacFisher
    names: tuple[str, ...]
    layer: Tensor
    place: Tensor
    scale: Tensor
    energy_kept: float

    @classmethod
    def of_most_energy(cls, fisher: EkfacFisher, samples: Moments, steps: Moments, size: int) -> Self:
        """Choose the coordinates with most energy E[u_p^2] E[g_p^2], u = (F + damping)^-1 q (design section 4).

        Args:
            fisher: whose eigenbasis it is.
            samples: E[g_p^2] over training samples.
            steps: E[u_p^2], up to a factor, over queries that no figure is reported of: training queries, or samples
                taken as queries.
            size: K, or fewer where the layers have fewer coordinates.
        """
        names = tuple(sorted(fisher.layers))
        damped = torch.cat([fisher.layers[name].damped(fisher.damping).flatten().double() for name in names])
        seen, asked = (torch.cat([moments[name] for name in names]) for moments in (samples, steps))
        energy = seen * asked
        size = min(size, len(energy))
        chosen = energy.argsort(descending=True, stable=True)[:size]
        ends = torch.tensor([fisher.layers[name].eigenvalues.numel() for name in names], device=chosen.device).cumsum(0)
        layer = torch.searchsorted(ends, chosen, right=True)
        place = chosen - torch.cat([ends.new_zeros(1), ends])[layer]
        kept = float(energy[chosen].sum() / energy.sum())
        return cls(fisher, names, layer, place, damped[chosen].rsqrt().float(), kept)

    def __len__(self) -> int:
        return len(self.place)

    def of_samples(self, gradients: SampleGradients) -> Tensor:
        """Return the sketches of samples, (n, flips, K) float32."""
        found = self.scale.new_empty(gradients.count, len(self))
        for name, mine, places in self._by_layer:
            found[:, mine] = gradients.rotated(name, self.fisher.layers[name], places).float()
        return (found * self.scale).view(-1, gradients.flips, len(self))

    def of_query(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the sketches of gradients given by layer, each (..., d_out, d_in): (..., K) float32."""
        found = self.scale.new_empty(*gradient[self.names[0]].shape[:-2], len(self))
        for name, mine, places in self._by_layer:
            rotated = self.fisher.layers[name].rotate(gradient[name]).flatten(-2)
            found[..., mine] = rotated[..., places].float()
        return found * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """Return what `of_tensors` builds the sketch from."""
        return {
            "layer": self.layer.int(),
            "place": self.place.int(),
            "scale": self.scale,
            "energy": torch.tensor(self.energy_kept, dtype=torch.float64),
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], fisher: EkfacFisher) -> Self:
        """Build the sketch of what `tensors` returned, on the device of the Fisher."""
        names = tuple(sorted(fisher.layers))
        device = fisher.layers[names[0]].eigenvalues.device
        layer, place = (tensors[name].long().to(device) for name in ("layer", "place"))
        return cls(fisher, names, layer, place, tensors["scale"].to(device), tensors["energy"].item())

    def coordinates_of(self, name: str) -> Tensor:
        """Return the numbers of the coordinates that are of a layer, ascending."""
        return (self.layer == self.names.index(name)).nonzero().flatten()

    @functools.cached_property
    def _by_layer(self) -> list[tuple[str, Tensor, Tensor]]:
        """The layers that have coordinates, each with their numbers and places."""
        found = []
        for name in self.names:
            mine = self.coordinates_of(name)
            if len(mine):
                found.append((name, mine, self.place[mine]))
        return found


def sample_moments(fisher: EkfacFisher, gradients: Iterable[SampleGradients]) -> dict[str, Tensor]:
    """Return E[(U_B^T G U_A)^2] over samples and flips.

    The eigenvalues of the Fisher are the same of gradients at one noise; here the gradients are means over a plan.
    """
    return _mean_squares(fisher, (some.rotated for some in gradients))


def step_moments(fisher: EkfacFisher, steps: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return E[(U_B^T D U_A)^2] over unlearning steps D, some at a time by layer, (queries, d_out, d_in)."""

    def rows(some: Mapping[str, Tensor], name: str, factors: LayerFactors) -> Tensor:
        return factors.rotate(some[name]).flatten(1)

    return _mean_squares(fisher, (functools.partial(rows, some) for some in steps))


@torch.no_grad()
def _mean_squares(fisher: EkfacFisher, batches: Iterable[Callable[[str, LayerFactors], Tensor]]) -> dict[str, Tensor]:
    """Return the mean square of each column by layer; a batch gives the rows (n, d_out * d_in) of a layer."""
    sums: dict[str, Tensor] = {}
    count = 0
    for rows_of in batches:
        for name, factors in fisher.layers.items():
            rows = rows_of(name, factors).double()
            sums[name] = sums.get(name, 0) + rows.square().sum(0)
        count += len(rows)
    return {name: total / count for name, total in sums.items()}
