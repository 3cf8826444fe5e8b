"""Counter-based noise: each tensor is a pure function of its owner, timestep and draw, never of its batch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64
tensor arithmetic, so that CPU and GPU draw the same bits; Box-Muller turns them into normals.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.errors import UsageError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

MAX_TRAIN_ID = 2**48
MAX_CAPTIONS = 2**15
MAX_TIMESTEPS = 2**16
MAX_DRAWS = 2**16


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """The (timestep, caption, noise draw) triples that estimate a training sample's loss.

    seed: of the noise.
    timesteps: T, for the evenly spaced grid; or the timesteps themselves.
    draws: noise draws at each timestep.
    first_timestep: start of the even grid. The design's grid starts at 0, and leaves the noisiest T_train / T out.
    weights: of each timestep in the mean over timesteps, where they are not spaced evenly; scaled to a mean of 1.
    antithetic: draw 2k + 1 is the negative of draw 2k, so that odd terms cancel (Hammersley & Morton, 1956).
    """

    seed: int
    timesteps: int | tuple[int, ...]
    draws: int
    first_timestep: int = 0
    weights: tuple[float, ...] | None = None
    antithetic: bool = False

    def __post_init__(self) -> None:
        if self.draws > MAX_DRAWS:
            raise UsageError(f"teacher.draws is {self.draws:,}: noise is told apart up to {MAX_DRAWS:,} draws")

    def timestep_values(self, train_timesteps: int) -> Tensor:
        """Return the timesteps at which a loss is taken: `arange(first, T_train, T_train // T)`, or those listed.

        Raises:
            UsageError: the model's schedule has no such grid, or has too many timesteps.
        """
        if train_timesteps > MAX_TIMESTEPS:
            raise UsageError(
                f"the model's schedule has {train_timesteps:,} timesteps: at most {MAX_TIMESTEPS:,} are used"
            )
        if not isinstance(self.timesteps, int):
            if max(self.timesteps) >= train_timesteps:
                raise UsageError(
                    f"teacher.timestep_list has {max(self.timesteps)} but the model's schedule ends at "
                    f"{train_timesteps - 1}"
                )
            return torch.tensor(self.timesteps)
        if self.timesteps > train_timesteps:
            raise UsageError(f"teacher.timesteps is {self.timesteps} but the model's schedule has {train_timesteps}")
        stride = train_timesteps // self.timesteps
        if self.first_timestep >= stride:
            raise UsageError(f"teacher.first_timestep is {self.first_timestep}: give one below the stride, {stride}")
        return torch.arange(self.first_timestep, train_timesteps, stride)

    def timestep_weights(self, count: int) -> Tensor:
        """Return w_t of each of the `count` timesteps, (count,) float64, of mean 1."""
        weights = torch.tensor(self.weights or (1.0,) * count, dtype=torch.float64)
        return weights / weights.mean()

    def groups(self, most: int) -> Tensor:
        """Split the draws into groups of independent noise, whose spread tells how sure the plan's mean is.

        Every group has its draws at all timesteps: between timesteps there is more than noise. A draw and its negative
        are not independent and stay together.

        Returns:
            (draws,) int64, ascending: the number of its group, of `most` or of as many as there are independent draws.
        """
        independent = torch.arange(self.draws) // (1 + self.antithetic)
        count = int(independent[-1]) + 1
        return independent * min(most, count) // count

    def noise(
        self,
        train_ids: Tensor,
        flips: Tensor,
        captions: Tensor,
        timesteps: Tensor,
        draws: Tensor,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Return the noise of each row of the plan, (n, *shape) float32; see `gaussian_noise`."""
        key = stream_key(self.seed, "training samples")
        if not self.antithetic:
            return gaussian_noise(key, train_ids, timesteps, draws, shape, captions=captions, flips=flips)
        noise = gaussian_noise(key, train_ids, timesteps, draws // 2, shape, captions=captions, flips=flips)
        sign = 1 - 2 * (draws % 2)
        return noise * sign.view(-1, *[1] * len(shape))


@dataclass(frozen=True, kw_only=True)
class CommonNoisePlan(NoisePlan):
    """A noise plan whose noise is the same for every sample, caption and flip: a function of timestep and draw alone.

    Source: MUCS (arXiv 2605.17938), which compares training samples at one list of (noise, timestep).
    """

    def noise(
        self,
        train_ids: Tensor,
        flips: Tensor,
        captions: Tensor,
        timesteps: Tensor,
        draws: Tensor,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Return the noise of each row of the plan, (n, *shape) float32."""
        one = torch.zeros_like(train_ids)
        return super().noise(one, one, one, timesteps, draws, shape)


def stream_key(seed: int, purpose: str) -> tuple[int, int]:
    """Return the Philox key of an independent stream of noise, two 32-bit words."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counters: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Turn four words of a counter into four random words, each an int64 in [0, 2^32), by Philox4x32-10."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps around in int64; the mask after the shift drops the sign bits.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(_MASK), product0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def gaussian_noise(
    key: tuple[int, int],
    owners: Tensor,
    timesteps: Tensor,
    draws: Tensor,
    shape: tuple[int, ...],
    *,
    captions: Tensor | int = 0,
    flips: Tensor | int = 0,
) -> Tensor:
    """Return standard normal noise, one tensor for each row of the broadcast arguments.

    Args:
        key: the stream, from `stream_key`.
        owners: train_id (or number of the query), (n,), in [0, 2^48).
        timesteps: (n,), below 2^16.
        draws: number of the noise draw, (n,), below 2^16.
        shape: of one noise tensor.
        captions: number of the caption among its sample's captions, below 2^15.
        flips: 1 where the image is flipped.

    Returns:
        (n, *shape) float32 on the device of `owners`; a pure function of the arguments row by row.
    """
    elements = math.prod(shape)
    blocks = torch.arange((elements + 3) // 4, device=owners.device)
    high = (owners >> 32) << 16 | timesteps
    low = (
        torch.as_tensor(flips, device=owners.device) << 31 | torch.as_tensor(captions, device=owners.device) << 16
    ) | draws
    full = (len(owners), len(blocks))
    counters = tuple(
        words.expand(full)
        for words in (blocks[None], (owners & _MASK)[:, None], high[:, None], low.expand(len(owners))[:, None])
    )
    words = philox(counters, key)  # type: ignore[arg-type]
    radius0, radius1 = (_radius(word) for word in words[:2])
    angle0, angle1 = (_unit(word).mul_(2 * math.pi) for word in words[2:])
    normals = torch.stack(
        (radius0 * angle0.cos(), radius0 * angle0.sin(), radius1 * angle1.cos(), radius1 * angle1.sin()), dim=-1
    )
    return normals.flatten(1)[:, :elements].reshape(len(owners), *shape)


def uniform(key: tuple[int, int], owner: int, count: int) -> Tensor:
    """Return `count` uniform numbers in [0, 1), (count,) float32: a pure function of the arguments."""
    block = torch.arange(count)
    owners = torch.full_like(block, owner)
    words = philox((block, owners & _MASK, owners >> 32, torch.zeros_like(block)), key)
    return _unit(words[0])


def stratified_timesteps(key: tuple[int, int], owner: int, count: int, train_timesteps: int) -> Tensor:
    """Return timesteps, the i-th uniform in the i-th of `count` equal parts of [0, train_timesteps): (count,) int64."""
    strata = (torch.arange(count) + uniform(key, owner, count)) / count
    return (strata * train_timesteps).long().clamp_(max=train_timesteps - 1)


def _unit(words: Tensor) -> Tensor:
    return (words >> 8).float().mul_(2.0**-24)


def _radius(words: Tensor) -> Tensor:
    # One step above zero keeps the logarithm finite.
    return ((words >> 8) + 1).float().mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
