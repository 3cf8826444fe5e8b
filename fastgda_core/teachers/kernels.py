"""Kernels of gradient features: what turns inner products of features into scores of TRAK and its kin.

With the features of the samples as the rows of Phi, (n, d), a query's q and a ridge lambda, the scores are
Phi (Phi^T Phi + lambda I)^-1 q (Park et al., "TRAK", 2023, Eq. 15, without its weights, which are 1 for a loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Protocol

import torch
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.interruption import checkpoint

Tiles = MutableMapping[tuple[int, int], Tensor]  # of a symmetric matrix, by row and column of tiles, the lower half
DUAL_SAMPLES = 4096  # up to so many rows the kernel is that of the Gram matrix, 128 MiB in float64
TILE = 2048  # rows and columns of a tile of Phi^T Phi
_SMALLEST = 1e-12  # x the largest eigenvalue: below, a direction is rounding
_COLUMNS = 2048  # made float64 at a time


class Kernel(Protocol):
    """Turns features of queries into vectors whose inner products with the samples' features are the scores."""

    def of(self, queries: Tensor) -> Tensor:
        """Return the vectors, (queries, d) float64, of features (queries, d)."""


class DualKernel:
    """The kernel of few samples, exact, by the eigenvalues of their Gram matrix.

    With Phi Phi^T = U S U^T the part of the inverse in the samples' span is Phi^T U ((S + lambda) S)^-1 U^T Phi; at
    lambda = 0 that is the pseudo-inverse. What is orthogonal to all samples is left out: no score sees it.
    """

    def __init__(self, features: Tensor, ridge: float) -> None:
        """Take Phi, (n, d), and lambda."""
        gram = features.new_zeros(len(features), len(features), dtype=torch.float64)
        for some in features.split(_COLUMNS, dim=1):
            gram.addmm_(some.double(), some.double().T)
            checkpoint()
        values, vectors = torch.linalg.eigh(gram)
        kept = values > _SMALLEST * values[-1]
        self._features, self._vectors, values = features, vectors[:, kept], values[kept]
        self._inverse = 1 / ((values + ridge) * values)

    def of(self, queries: Tensor) -> Tensor:
        """Return the vectors, (queries, d) float64, of features (queries, d)."""
        products = queries.new_zeros(len(queries), len(self._features), dtype=torch.float64)
        for some, asked in zip(self._features.split(_COLUMNS, 1), queries.split(_COLUMNS, 1), strict=True):
            products.addmm_(asked.double(), some.double().T)
        weights = products @ self._vectors * self._inverse @ self._vectors.T
        return torch.cat([weights @ some.double() for some in self._features.split(_COLUMNS, 1)], dim=1)


class PrimalKernel:
    """The kernel of many samples: a Cholesky factor of Phi^T Phi + lambda I, tile by tile.

    One pass over the samples makes a row of tiles; a row of them, or three, are in memory at a time. Products are made
    in the features' precision and summed in float64.
    """

    def __init__(self, blocks: Callable[[], Iterable[Tensor]], size: int, ridge: float, tiles: Tiles) -> None:
        """Factor the matrix.

        Args:
            blocks: the rows of Phi, (some, d) at a time, anew at each call.
            size: d.
            ridge: lambda.
            tiles: where the factor is kept: a dictionary, or something that keeps it elsewhere.

        Raises:
            UsageError: the matrix has no inverse.
        """
        self._tiles = tiles
        self._edges = [slice(start, min(start + TILE, size)) for start in range(0, size, TILE)]
        for i, mine in enumerate(self._edges):
            self._sum_row(i, mine, blocks, ridge)
        for j in range(len(self._edges)):
            self._factor_column(j)

    def of(self, queries: Tensor) -> Tensor:
        """Return the vectors, (queries, d) float64, of features (queries, d)."""
        found, edges, tiles = queries.double().T.clone(), self._edges, self._tiles
        for i, mine in enumerate(edges):
            for j in range(i):
                found[mine] -= tiles[i, j] @ found[edges[j]]
            found[mine] = torch.linalg.solve_triangular(tiles[i, i], found[mine], upper=False)
        for i in reversed(range(len(edges))):
            for j in range(i + 1, len(edges)):
                found[edges[i]] -= tiles[j, i].T @ found[edges[j]]
            found[edges[i]] = torch.linalg.solve_triangular(tiles[i, i].T, found[edges[i]], upper=True)
        return found.T

    def _sum_row(self, i: int, mine: slice, blocks: Callable[[], Iterable[Tensor]], ridge: float) -> None:
        """Make the i-th row of tiles of Phi^T Phi + lambda I, up to the diagonal."""
        edges = self._edges[: i + 1]
        row: list[Tensor] = []
        for block in blocks():
            if not row:
                shapes = [(mine.stop - mine.start, theirs.stop - theirs.start) for theirs in edges]
                row = [block.new_zeros(shape, dtype=torch.float64) for shape in shapes]
            for tile, theirs in zip(row, edges, strict=True):
                tile.add_(block[:, mine].T @ block[:, theirs])
            checkpoint()
        row[i].diagonal().add_(ridge)
        self._tiles.update({(i, j): tile for j, tile in enumerate(row)})

    def _factor_column(self, j: int) -> None:
        """Replace the j-th column of tiles by that of the factor; those before are the factor's already."""
        tiles = self._tiles
        pivot = tiles[j, j]
        for k in range(j):
            left = tiles[j, k]
            pivot = pivot - left @ left.T
        factor, failed = torch.linalg.cholesky_ex(pivot)
        if failed.item() or not torch.isfinite(factor).all():
            raise UsageError(
                "the kernel of the samples' gradients cannot be inverted: raise teacher.ridge, or take fewer "
                "dimensions in teacher.projection"
            )
        tiles[j, j] = factor
        for i in range(j + 1, len(self._edges)):
            below = tiles[i, j]
            for k in range(j):
                below = below - tiles[i, k] @ tiles[j, k].T
            tiles[i, j] = torch.linalg.solve_triangular(factor, below.T, upper=False).T
            checkpoint()
