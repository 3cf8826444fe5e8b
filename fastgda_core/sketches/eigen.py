"""Eigen sketches: the coordinates of a gradient, seen in the Fisher's eigenbasis, that scores rest on most.

With g the gradient of a sample and q that of a query, both as U_B^T G U_A in the basis of EK-FAC (George et al., 2018),
a first-order score is (alpha / N) sum_p q_p g_p / (lambda_p + damping). A sketch keeps K coordinates of
g_p / sqrt(lambda_p + damping), and the score is an inner product of two sketches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher
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
    def of_most_energy(cls, fisher: EkfacFisher, samples: Moments, queries: Moments, size: int) -> Self:
        """Choose the coordinates with most energy E[u_p^2] E[g_p^2], u = (F + damping)^-1 q (design section 4).

        Args:
            fisher: whose eigenbasis it is.
            samples: E[g_p^2] over training samples.
            queries: E[q_p^2] over queries that no figure is reported of: training queries, or samples taken as queries.
            size: K, or fewer where the layers have fewer coordinates.
        """
        names = tuple(fisher.layers)
        damped = torch.cat([_damped(fisher, name) for name in names])
        seen, asked = (torch.cat([moments[name] for name in names]) for moments in (samples, queries))
        energy = seen * asked / damped.square()
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
        for number, name in enumerate(self.names):
            mine = (self.layer == number).nonzero().flatten()
            if len(mine):
                found[:, mine] = gradients.rotated(name, self.fisher.layers[name], self.place[mine]).float()
        return (found * self.scale).view(-1, gradients.flips, len(self))

    def of_query(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch of a gradient given by layer, each (d_out, d_in): (K,) float32."""
        found = torch.empty_like(self.scale)
        for number, name in enumerate(self.names):
            mine = self.layer == number
            found[mine] = _rotated(self.fisher, name, gradient[name])[self.place[mine]].float()
        return found * self.scale


@torch.no_grad()
def sample_moments(fisher: EkfacFisher, gradients: Iterable[SampleGradients]) -> dict[str, Tensor]:
    """Return E[(U_B^T G U_A)^2] over samples and flips.

    The eigenvalues of the Fisher are the same of gradients at one noise; here the gradients are means over a plan.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for some in gradients:
        count += some.count
        for name, factors in fisher.layers.items():
            every = torch.arange(factors.eigenvalues.numel(), device=factors.eigenvalues.device)
            squares = some.rotated(name, factors, every).double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def query_moments(fisher: EkfacFisher, gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return E[(U_B^T G U_A)^2] over gradients given by layer, each (d_out, d_in)."""
    sums: dict[str, Tensor] = {}
    count = 0
    for gradient in gradients:
        count += 1
        for name in fisher.layers:
            squares = _rotated(fisher, name, gradient[name]).double().square()
            sums[name] = sums[name] + squares if name in sums else squares
    return {name: total / count for name, total in sums.items()}


def _rotated(fisher: EkfacFisher, name: str, gradient: Tensor) -> Tensor:
    """Return U_B^T G U_A of a gradient (d_out, d_in), flat."""
    factors = fisher.layers[name]
    return (factors.output_basis.T @ gradient.to(factors.output_basis.dtype) @ factors.input_basis).flatten()


def _damped(fisher: EkfacFisher, name: str) -> Tensor:
    """Return lambda + damping of a layer, flat, float64."""
    eigenvalues = fisher.layers[name].eigenvalues.double().flatten()
    return eigenvalues + fisher.damping * eigenvalues.mean()
