"""Nonparametric data attribution: which training patches would draw each patch of a query, if a model were perfect.

The denoiser that minimises the loss over a training set is known in closed form: given a noisy patch x = s y + sigma
eps it gives the mean of all training patches y, weighted by the posterior w(y | x) ~ exp(-|x - s y|^2 / (2 sigma^2)).
A convolutional denoiser sees patches, each like every other inside the picture, and apart from those at its edges.
A sample's score is its share of these weights, over the places of the query's patches. No model is run.

Source: Zhao et al., "Nonparametric data attribution for diffusion models" (2025, arXiv 2510.14269), and its code,
sail-sg/NDA; the patches' posterior is that of Kamb & Ganguli (2024, arXiv 2412.20292).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.diffusion.noise import gaussian_noise, stream_key
from fastgda_core.diffusion.schedule import Schedule

_LOGITS_AT_ONCE = 2**24  # numbers in memory: what bounds it, however many samples there are
_PATCHES_AT_ONCE = 2**24


class NoiseLevel(NamedTuple):
    """A noisy image is signal * clean + noise * eps."""

    signal: float
    noise: float


def noise_level(schedule: Schedule, timestep: int) -> NoiseLevel:
    """Return signal and noise of a timestep of a model's schedule."""
    one, at = torch.ones(1, 1, 1, 1), torch.tensor([timestep])
    signal, noise = schedule.add_noise(one, 0 * one, at), schedule.add_noise(0 * one, one, at)
    return NoiseLevel(float(signal), float(noise))


@dataclass(frozen=True)
class PatchScale:
    """The patches of one size, one around every place of a picture.

    side: numbers along a patch's side. pooling: pixels along the side of what one number is the sum of, divided by
        `pooling`, so that noise stays of the same size.
    """

    side: int
    pooling: int = 1

    @classmethod
    def of_size(cls, size: int) -> PatchScale:
        """Return patches of so many pixels a side: an odd size as they are, an even one in blocks of two by two."""
        return cls(size) if size % 2 else cls(size // 2, 2)

    @property
    def margins(self) -> tuple[int, int]:
        """Pixels of a patch before its place, and after it."""
        pixels = self.side * self.pooling - 1
        return pixels // 2, pixels - pixels // 2

    def patches(self, images: Tensor) -> Tensor:
        """Return all patches, (n, places, d), of images (n, c, h, w), places row by row; 0 outside the picture."""
        before, after = self.margins
        pooled = F.avg_pool2d(F.pad(images, (before, after, before, after)), self.pooling, stride=1) * self.pooling
        return F.unfold(pooled, self.side, dilation=self.pooling).transpose(1, 2)

    def alike(self, height: int, width: int) -> list[Tensor]:
        """Return the places of a picture in groups of those whose patches lack the same pixels, (places,) int64 each.

        Patches of different groups are infinitely unlike; the published code puts 10 outside the picture (`mask_value`)
        which at its noise levels is the same to the last bit.
        """
        groups = defaultdict[tuple[int, ...], list[int]](list)
        for row in range(height):
            for column in range(width):
                lacks = (*self._lacks(row, height), *self._lacks(column, width))
                groups[lacks].append(row * width + column)
        return [torch.tensor(group) for group in groups.values()]

    def _lacks(self, place: int, length: int) -> tuple[int, int]:
        before, after = self.margins
        return max(0, before - place), max(0, place + after + 1 - length)


class View(NamedTuple):
    """Noisy queries, (queries, c, h, w), at one noise level, and the patches through which they are looked at."""

    noisy: Tensor
    level: NoiseLevel
    scale: PatchScale


@dataclass(frozen=True)
class PatchPlan:
    """The noise levels, noises and patch sizes over which a score is the mean.

    timesteps: the noise levels. draws: noises at each. seed: of the noise, which is one for all queries, as published.
    sizes: of patches, in pixels a side; see `PatchScale.of_size`.
    matches: the most patches of one image that count for one patch of the query; None: all.
    """

    timesteps: tuple[int, ...]
    sizes: tuple[int, ...]
    matches: int | None
    draws: int = 1
    seed: int = 0

    def views(self, schedule: Schedule, queries: Tensor) -> Iterator[View]:
        """Yield the views of queries, (queries, c, h, w)."""
        key, shape = stream_key(self.seed, "patch posterior"), tuple(queries.shape[1:])
        for timestep in self.timesteps:
            for draw in range(self.draws):
                owner, at, drawn = (torch.tensor([each], device=queries.device) for each in (0, timestep, draw))
                eps = gaussian_noise(key, owner, at, drawn, shape).to(queries.dtype)
                level = noise_level(schedule, timestep)
                noisy = level.signal * queries + level.noise * eps
                for size in self.sizes:
                    yield View(noisy, level, PatchScale.of_size(size))


def log_partitions(plan: PatchPlan, schedule: Schedule, queries: Tensor, samples: Iterable[Tensor]) -> Tensor:
    """Return the logarithm of what the weights of all training patches are divided by, at each place of each query.

    It is the one thing that the scores of a sample need of the other samples.

    Args:
        queries: (queries, c, h, w).
        samples: all of them, in blocks (n, c, h, w); read once.

    Returns:
        (queries, views, places) float64.
    """
    views = list(plan.views(schedule, queries))
    places = queries.shape[2] * queries.shape[3]
    total = torch.full((len(queries), len(views), places), -math.inf, dtype=torch.float64, device=queries.device)
    for block in samples:
        for number, view in enumerate(views):
            for where, _, logits in _logits(view, block):
                total[:, number, where] = torch.logaddexp(total[:, number, where], logits.logsumexp((2, 3)).double())
    return total


def patch_scores(plan: PatchPlan, schedule: Schedule, queries: Tensor, partitions: Tensor, samples: Tensor) -> Tensor:
    """Return scores: the share of a sample in what a perfect model would draw of the query.

    They add up to 1 over all samples, less what `plan.matches` leaves out.

    Args:
        queries: (queries, c, h, w).
        partitions: of these queries against all samples, from `log_partitions`.
        samples: (n, c, h, w).

    Returns:
        (queries, n) float64; higher is more influential.
    """
    total = torch.zeros(len(queries), len(samples), dtype=torch.float64, device=queries.device)
    for _, first, weights in _place_weights(plan, schedule, queries, partitions, samples):
        total[:, first : first + weights.shape[2]] += weights.sum(1)
    return total / (partitions.shape[1] * partitions.shape[2])


def heat_maps(plan: PatchPlan, schedule: Schedule, queries: Tensor, partitions: Tensor, samples: Tensor) -> Tensor:
    """Return where in the queries' pictures the influence of samples lies; the mean over places is the score.

    Arguments are those of `patch_scores`.

    Returns:
        (queries, n, h, w) float64: the sample's share at the patch around each place, the mean over views.
    """
    height, width = queries.shape[2:]
    shares = torch.zeros(len(queries), height * width, len(samples), dtype=torch.float64, device=queries.device)
    for where, first, weights in _place_weights(plan, schedule, queries, partitions, samples):
        shares[:, where, first : first + weights.shape[2]] += weights
    return (shares / partitions.shape[1]).transpose(1, 2).unflatten(2, (height, width))


def _place_weights(
    plan: PatchPlan, schedule: Schedule, queries: Tensor, partitions: Tensor, samples: Tensor
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield places, the number of the first sample, and weights at these places, (queries, places, n) float64."""
    for number, view in enumerate(plan.views(schedule, queries)):
        for where, first, logits in _logits(view, samples):
            most = plan.matches or logits.shape[3]
            counted = logits.topk(most, dim=3, sorted=False).values if most < logits.shape[3] else logits
            yield where, first, (counted.logsumexp(3).double() - partitions[:, number, where, None]).exp()


def _logits(view: View, samples: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield places of the queries and what is the logarithm of the weights of the patches of samples there.

    Without -|x|^2 / (2 sigma^2), which all patches of samples have in common.

    Returns:
        places (p,), the number of the first sample, and (queries, p, n, places of a sample that are alike), in the
        dtype of the samples.
    """
    (noisy, level, scale), (channels, height, width) = view, samples.shape[1:]
    asked, groups, sharpness = scale.patches(noisy), scale.alike(height, width), level.noise**-2
    some = max(1, _PATCHES_AT_ONCE // (channels * scale.side**2 * height * width))
    for first in range(0, len(samples), some):
        kept = scale.patches(samples[first : first + some]) * level.signal
        for group in groups:
            here = kept[:, group]
            less = here.square().sum(2).flatten() * (-sharpness / 2)
            step = max(1, _LOGITS_AT_ONCE // (len(asked) * len(less)))
            for where in group.split(step):
                logits = torch.addmm(less, asked[:, where].flatten(0, 1), here.flatten(0, 1).T, alpha=sharpness)
                yield where, first, logits.view(len(asked), len(where), len(here), len(group))
