"""Principal sketches: eigen sketches, turned to the directions in which training samples lie, and cut short.

A score is an inner product <q, z_i> with a sample's eigen sketch z_i: what of q stands at right angles to all z_i adds
nothing. With V the first R right singular vectors of the sketches of some samples, V^T q and V^T z_i keep of these
inner products the most that R numbers can, in the mean square over them and over all directions of q (Eckart & Young,
1936).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher
from fastgda_core.errors import UsageError
from fastgda_core.sketches.eigen import EigenSketch
from fastgda_core.teachers.sample_gradients import SampleGradients

_AT_ONCE = 8192  # coordinates of a product; the products are summed in float64
_STRETCHES = 8  # of rows, so that little more than half of a symmetric product is made


@dataclass(frozen=True)
class PrincipalSketch:
    """The directions that are kept, those with most energy first, so that the first few make a smaller sketch.

    eigen: whose coordinates are turned.
    directions: (K, R) float32, of length 1 and at right angles.
    energy_kept: share of the squared length of the samples' eigen sketches, at 1, 2, ... R directions: (R,) float64.
    """

    eigen: EigenSketch
    directions: Tensor
    energy_kept: Tensor

    @classmethod
    def of_samples_like(cls, eigen: EigenSketch, sketches: Tensor, size: int) -> Self:
        """Choose the directions by the eigen sketches of some samples.

        Args:
            eigen: that made the sketches.
            sketches: (m, K), of more samples than there are directions, as far as possible; in any precision, as they
                are many and their rounding is independent.
            size: R, or fewer where there are fewer samples or coordinates.
        """
        squares, vectors = torch.linalg.eigh(_gram(sketches))
        size = min(size, sketches.shape[1], int((squares > squares[-1] * 1e-10).sum()))
        squares, vectors = squares.flip(0), vectors.flip(1)[:, :size]
        weights = (vectors / squares[:size].sqrt()).float()
        directions = torch.cat([block.float().T @ weights for block in sketches.split(_AT_ONCE, dim=1)])
        return cls(eigen, directions, squares[:size].cumsum(0) / squares.clamp_min(0).sum())

    def __len__(self) -> int:
        return self.directions.shape[1]

    def of_samples(self, gradients: SampleGradients) -> Tensor:
        """Return the sketches of samples, (n, flips, R) float32."""
        return self.eigen.of_samples(gradients) @ self.directions

    def of_query(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the sketches of gradients given by layer, each (..., d_out, d_in): (..., R) float32."""
        return self.eigen.of_query(gradient) @ self.directions

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load` reads; directions in half precision."""
        tensors = {
            **self.eigen.tensors(),
            "directions": self.directions.half(),
            "directions_energy": self.energy_kept,
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], fisher: EkfacFisher) -> Self:
        """Build the sketch of the tensors of a file that `save` wrote.

        Args:
            tensors: on any device.
            fisher: of the same layers, on the device where sketches are made.

        Raises:
            UsageError: the sketch is of other layers.
        """
        eigen = EigenSketch.of_tensors(tensors, fisher)
        device = eigen.scale.device
        try:
            directions, energy = tensors["directions"].to(device).float(), tensors["directions_energy"].to(device)
        except KeyError as error:
            raise UsageError(f"the sketch lacks {error}: make it again") from None
        return cls(eigen, directions, energy)


def _gram(rows: Tensor) -> Tensor:
    """Return all inner products of rows, (m, K): (m, m) float64. Each pair of rows is multiplied out once."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    stretches = [(int(some[0]), int(some[-1]) + 1) for some in torch.arange(len(rows)).chunk(_STRETCHES)]
    for columns in rows.split(_AT_ONCE, dim=1):
        block = columns.float()
        for first, last in stretches:
            gram[first:last, :last] += block[first:last] @ block[:last].T
    return gram.tril() + gram.tril(-1).T
