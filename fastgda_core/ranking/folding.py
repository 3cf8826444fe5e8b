"""Fold a regression of output gradients, the Fisher's eigenbasis and a sketch's directions into one small matrix.

The sketch of a gradient sum_t y_t x_t^T, with inputs x_t and predicted output gradients y_t of all layers that see
them, is linear in y_t x_t^T. The predictions lie near few directions over all these layers together, and few
coordinates matter there: of 540,672 weights the demo's tower keeps some five thousand numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.curvature.fisher import LayerFactors
from fastgda_core.sketches.principal import PrincipalSketch
from fastgda_core.teachers.gradients import weight_gradient

ENERGY = 0.98  # of the sketches' mean square that is kept, twice over; on the demo it costs 0.01 of mAP(100)
_AT_ONCE = 2**26  # numbers of an unfolded layer


@dataclass(frozen=True)
class FoldedLayers:
    """Predicts what the gradients of layers that see the same inputs add to a sketch.

    weights: (p, k) float32, from a token's row to its output gradient in k directions over all these layers.
    basis: (d_in, d_in) float32, of the inputs.
    places: (K,) the coordinates that are kept of a gradient in both bases, in the flattened (k, d_in).
    directions: (R, K) float32, from these to the sketch.
    """

    weights: Tensor
    basis: Tensor
    places: Tensor
    directions: Tensor

    def sketches(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """Return (queries, R) float32.

        Args:
            rows: what output gradients are predicted from, (queries * tokens, p).
            inputs: of the layers, (queries, tokens, d_in).
        """
        outputs = (rows @ self.weights).view(*inputs.shape[:2], -1)
        gradients = weight_gradient(outputs, inputs.float() @ self.basis)
        return F.linear(gradients.flatten(1)[:, self.places], self.directions)


def fold(
    squares: Tensor, weights: Mapping[str, Tensor], sketch: PrincipalSketch, size: int, energy: float = ENERGY
) -> FoldedLayers:
    """Fold what follows a regression into it.

    Args:
        squares: X^T X of the rows that were learned from, (p, p) float64, positive definite; the first d_in columns are
            the layers' inputs.
        weights: of the regression, (p, d_out) float64, by layer; all of them see the same inputs.
        sketch: of gradients; of its coordinates those of these layers count.
        size: R, the first numbers of the sketch.
        energy: share that is kept of the sketches' mean square over these rows, first by directions of the output
            gradients, then by coordinates.
    """
    layers = {name: _Unfolded.of(sketch, name, size) for name in weights}
    basis = layers[next(iter(layers))].factors.input_basis
    inputs = squares[: len(basis), : len(basis)]
    rotated = torch.cat([weights[name] @ each.factors.output_basis.double() for name, each in layers.items()], dim=1)
    # In these units every output gradient moves the sketch alike, so that what is left out costs the sketch the least.
    scale = torch.cat([each.energy_of_outputs(inputs) for each in layers.values()]).sqrt()
    squared, chosen = _principal(torch.linalg.cholesky(squares).T @ (rotated * scale), energy)
    widths = [weights[name].shape[1] for name in layers]
    up = torch.where(scale > 0, 1 / scale, 0)[:, None] * chosen
    parts = [each.turned(mine, basis) for each, mine in zip(layers.values(), up.split(widths), strict=True)]
    directions = torch.stack(parts).sum(0)
    moved = squared[:, None] * _diagonal(basis, inputs) * directions.double().square().sum(2)
    places = _most(moved.flatten(), energy)
    return FoldedLayers(
        (rotated @ (scale[:, None] * chosen)).float(),
        basis.float(),
        places,
        directions.flatten(0, 1)[places].T.contiguous(),
    )


@dataclass(frozen=True)
class _Unfolded:
    """The coordinates of a sketch that are of one layer.

    outputs, inputs: (n,) where each stands in the layer's (d_out, d_in), in the eigenbasis.
    directions: (n, R) float32, from a coordinate to the sketch, the coordinate's scale included.
    """

    factors: LayerFactors
    outputs: Tensor
    inputs: Tensor
    directions: Tensor

    @classmethod
    def of(cls, sketch: PrincipalSketch, name: str, size: int) -> _Unfolded:
        eigen = sketch.eigen
        factors = eigen.fisher.layers[name]
        mine = eigen.coordinates_of(name)
        width = factors.eigenvalues.shape[1]
        directions = sketch.directions[mine, :size] * eigen.scale[mine, None]
        return cls(factors, eigen.place[mine] // width, eigen.place[mine] % width, directions)

    def energy_of_outputs(self, inputs: Tensor) -> Tensor:
        """Return how much a unit of each output gradient moves the sketch, squared, (d_out,) float64.

        Args:
            inputs: E[x x^T] up to a factor, (d_in, d_in) float64.
        """
        mean_squares = _diagonal(self.factors.input_basis, inputs)
        moved = self.directions.double().square().sum(1) * mean_squares[self.inputs]
        return moved.new_zeros(len(self.factors.output_basis)).index_add_(0, self.outputs, moved)

    def turned(self, up: Tensor, basis: Tensor) -> Tensor:
        """Return from k directions of output gradients and inputs in `basis` to the sketch, (k, d_in, R) float32.

        Args:
            up: from these directions to output gradients in the layer's eigenbasis, (d_out, k).
            basis: of the inputs, (d_in, d_in).
        """
        shape, count = self.factors.eigenvalues.shape, self.directions.shape[1]
        step = max(1, _AT_ONCE // self.factors.eigenvalues.numel())
        same = torch.equal(self.factors.input_basis, basis)
        found = []
        for few in self.directions.split(min(step, count), dim=1):
            dense = few.new_zeros(*shape, few.shape[1])
            dense[self.outputs, self.inputs] = few
            folded = torch.einsum("ok,oir->kir", up.to(few.dtype), dense)
            if not same:
                folded = torch.einsum("kir,ij->kjr", folded, (self.factors.input_basis.T @ basis).to(few.dtype))
            found.append(folded)
        return torch.cat(found, dim=2)


def _diagonal(basis: Tensor, squares: Tensor) -> Tensor:
    """Return the diagonal of U^T S U, (d,) float64."""
    return ((squares @ basis.double()) * basis.double()).sum(0)


def _principal(rows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return squared singular values of a matrix, (k,), and right singular vectors, (d, k): as many as the share."""
    wide = rows.shape[1] > rows.shape[0]
    squared, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = _most(squared, share)
    squared, vectors = squared[kept], vectors[:, kept]
    return squared, rows.T @ vectors / squared.sqrt() if wide else vectors


def _most(energy: Tensor, share: float) -> Tensor:
    """Return the fewest places that have a share of all energy, those with most of it first."""
    ordered, order = energy.clamp_min(0).sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    return order[(before < share * ordered.sum()) & (ordered > 0)]
