"""A sparse random projection of gradients: weights are permuted, signed and summed in groups.

One number of the result is the sum of one group, so a projection costs one addition a weight, and no matrix of weights
x dimensions is ever made. This is DMin's compression (Lin et al., 2024), and a Johnson-Lindenstrauss transform with one
entry a column and groups of equal size (Charikar et al., "Finding frequent items in data streams", 2002; Kane & Nelson,
2014). Projectors in packages: `traker` needs its CUDA kernel for more than a dense matrix, `sjlt` is CUDA alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.diffusion.noise import philox, stream_key

_AT_ONCE = 2**20  # counters of random words


@dataclass(frozen=True, eq=False)
class Projection:
    """Projects gradients of some layers to `size` numbers whose inner products are, on average, those of the gradients.

    The inner product of two projections has the mean <x, y> and a standard deviation of at most
    sqrt((|x|^2 |y|^2 + <x, y>^2) / size) over seeds. Where there are no more weights than numbers nothing is lost.

    slots: by layer (weights,) int32: twice the group, plus 1 where the sign is negative.
    """

    slots: Mapping[str, Tensor]
    size: int

    @classmethod
    def drawn(cls, weights: Mapping[str, int], size: int, seed: int, device: torch.device) -> Projection:
        """Draw the projection of layers with so many weights each to at most `size` numbers.

        The same on every device: a function of seed, weights and size. 24 bytes a weight while it is drawn, then 4.
        """
        count = sum(weights.values())
        keys, negative = _random_keys(count, seed)
        place = torch.empty_like(keys)
        place[keys.argsort(stable=True)] = torch.arange(count)
        size = min(size, count)
        slots = (place * size // count * 2 + negative).int().to(device)
        return cls(dict(zip(weights, slots.split(list(weights.values())), strict=True)), size)

    def of(self, gradients: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Return the projections of gradients, (n, size), from (n, weights) of each layer, one layer at a time."""
        sums: Tensor | None = None
        for name, gradient in gradients:
            if sums is None:
                sums = gradient.new_zeros(len(gradient), 2 * self.size)
            for row, each in zip(sums, gradient, strict=True):  # one by one: five times as fast on a CPU
                row.index_add_(0, self.slots[name], each)
        assert sums is not None
        return sums[:, 0::2] - sums[:, 1::2]


def _random_keys(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return 62-bit random keys and random bits, (count,) int64 each; two of each from four words of a counter."""
    key = stream_key(seed, "projection")
    keys, bits = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    for start in range(0, count, 2 * _AT_ONCE):
        counter = torch.arange(start // 2, start // 2 + min(_AT_ONCE, -(-(count - start) // 2)))
        zero = torch.zeros_like(counter)
        words = philox((counter & 0xFFFFFFFF, counter >> 32, zero, zero), key)
        both = torch.stack([words[0] << 30 | words[1] >> 2, words[2] << 30 | words[3] >> 2], 1).flatten()
        stretch = slice(start, min(start + 2 * _AT_ONCE, count))
        length = stretch.stop - start
        keys[stretch] = both[:length]
        bits[stretch] = torch.stack([words[1] & 1, words[3] & 1], 1).flatten()[:length]
    return keys, bits
