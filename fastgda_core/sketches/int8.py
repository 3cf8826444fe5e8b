"""Vectors of one byte a number, with a scale for each block of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

BLOCK = 64  # numbers with one scale
_LARGEST = 127


@dataclass(frozen=True)
class Int8Vectors:
    """Vectors, rounded block by block to the nearest of 255 values.

    values: (n, K) int8; scales: (n, ceil(K / BLOCK)) float32. A number is its value times its block's scale, with an
    error of at most half the scale.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Self:
        """Round vectors, (n, K).

        Raises:
            ValueError: a number is not finite.
        """
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError("a sketch has numbers that are not finite")
        blocks = _blocks(vectors.float())
        scales = blocks.abs().amax(2) / _LARGEST
        values = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]).round_()
        return cls(values.flatten(1)[:, : vectors.shape[1]].to(torch.int8), scales)

    def dense(self) -> Tensor:
        """Return the rounded vectors, (n, K) float32."""
        return (_blocks(self.values.float()) * self.scales[:, :, None]).flatten(1)[:, : self.values.shape[1]]


def bytes_of(size: int) -> int:
    """Return the bytes of one vector of `size` numbers with its scales."""
    return size + 4 * -(-size // BLOCK)


def _blocks(vectors: Tensor) -> Tensor:
    """Return (n, blocks, BLOCK), the last block filled up with zeros."""
    padded = torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % BLOCK))
    return padded.view(len(vectors), padded.shape[1] // BLOCK, BLOCK)
