"""Patch posteriors beside explicit loops in float64, and beside the denoiser that minimises the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray

from fastgda_core.diffusion.schedule import DiffusionSchedule, FlowMatchingSchedule
from fastgda_core.teachers import nda
from fastgda_core.teachers.nda import (
    NoiseLevel,
    PatchPlan,
    PatchScale,
    heat_maps,
    log_partitions,
    noise_level,
    patch_scores,
)

SCHEDULE = DiffusionSchedule(DDIMScheduler(num_train_timesteps=1000))
CHANNELS, HEIGHT, WIDTH = 2, 5, 6


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def scored(plan: PatchPlan, queries: torch.Tensor, samples: torch.Tensor, block: int = 100) -> torch.Tensor:
    partitions = log_partitions(plan, SCHEDULE, queries, samples.split(block))
    return patch_scores(plan, SCHEDULE, queries, partitions, samples)


def patch_at(image: NDArray[np.float64], row: int, column: int, size: int) -> list[float | None]:
    """Numbers of the patch around a place, None outside the picture; of an even size in blocks of two by two."""
    before, found = (size - 1) // 2, []
    pooling = 1 if size % 2 else 2
    for channel in image:
        for top in range(row - before, row - before + size, pooling):
            for left in range(column - before, column - before + size, pooling):
                cells = [(top + down, left + right) for down in range(pooling) for right in range(pooling)]
                inside = [channel[r, c] for r, c in cells if 0 <= r < HEIGHT and 0 <= c < WIDTH]
                found.append(sum(inside) / pooling if inside else None)
    return found


def pixels_inside(row: int, column: int, size: int) -> list[bool]:
    before = (size - 1) // 2
    rows, columns = (range(at - before, at - before + size) for at in (row, column))
    return [0 <= r < HEIGHT and 0 <= c < WIDTH for r in rows for c in columns]


def naive_shares(
    noisy: torch.Tensor, level: NoiseLevel, samples: torch.Tensor, size: int, matches: int | None
) -> NDArray[np.float64]:
    """The share of each sample at each place, (places, samples), patch by patch."""
    query, places = noisy.double().numpy(), [(row, column) for row in range(HEIGHT) for column in range(WIDTH)]
    shares = np.zeros((len(places), len(samples)))
    for number, place in enumerate(places):
        x = patch_at(query, *place, size)
        weights: list[list[float]] = []
        for sample in samples.double().numpy():
            of_sample = []
            for other in places:
                if pixels_inside(*other, size) != pixels_inside(*place, size):
                    continue
                y = patch_at(sample, *other, size)
                square = sum((a - level.signal * b) ** 2 for a, b in zip(x, y, strict=True) if a is not None)  # type: ignore[operator]
                of_sample.append(math.exp(-square / (2 * level.noise**2)))
            weights.append(of_sample)
        total = sum(sum(each) for each in weights)
        shares[number] = [sum(sorted(each, reverse=True)[:matches]) / total for each in weights]
    return shares


@pytest.mark.parametrize(
    ("sizes", "timesteps", "matches", "draws"),
    [((3,), (300,), None, 1), ((2, 5), (200, 600), None, 1), ((4, 3), (400,), 2, 2), ((11,), (500,), 100, 1)],
)
def test_shares_are_those_of_explicit_loops_over_patches(
    sizes: tuple[int, ...], timesteps: tuple[int, ...], matches: int | None, draws: int
) -> None:
    plan = PatchPlan(timesteps, sizes, matches, draws=draws, seed=3)
    queries, samples = pictures(2, 1), pictures(4, 2)
    samples[1] = queries[0]
    views = list(plan.views(SCHEDULE, queries))
    assert len(views) == len(sizes) * len(timesteps) * draws
    expected = np.zeros((2, HEIGHT * WIDTH, 4))
    for place, view in enumerate(views):
        size = sizes[place % len(sizes)]
        for query, noisy in enumerate(view.noisy):
            expected[query] += naive_shares(noisy, view.level, samples, size, matches) / len(views)
    partitions = log_partitions(plan, SCHEDULE, queries, samples.split(3))
    maps = heat_maps(plan, SCHEDULE, queries, partitions, samples)
    found = maps.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    scores = patch_scores(plan, SCHEDULE, queries, partitions, samples)
    np.testing.assert_allclose(scores.numpy(), expected.mean(1), rtol=1e-4, atol=1e-7)


def test_shares_of_all_samples_add_up_to_one() -> None:
    plan = PatchPlan((100, 500), (3, 4), None)
    torch.testing.assert_close(scored(plan, pictures(3, 1), pictures(7, 2)).sum(1), torch.ones(3, dtype=torch.float64))


def test_the_weights_mean_of_the_samples_minimises_the_denoising_loss() -> None:
    """On whole pictures the weighted mean is E[y | x]: no other function of x has a smaller loss, by Monte Carlo."""
    generator = torch.Generator().manual_seed(0)
    level = noise_level(SCHEDULE, 700)
    samples = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -0.8]]).view(3, 2, 1, 1)
    clean = torch.randint(3, (1_000_000,), generator=generator)
    noisy = level.signal * samples[clean].flatten(1) + level.noise * torch.randn(1_000_000, 2, generator=generator)
    near = (noisy - torch.tensor([0.3, 0.1])).norm(dim=1) < 0.1
    monte_carlo = samples[clean[near]].flatten(1).mean(0)
    error = samples[clean[near]].flatten(1).std(0) / int(near.sum()) ** 0.5
    # A query whose noisy image is (0.3, 0.1): its noise is that of the plan.
    plan = PatchPlan((700,), (1,), None)
    eps = next(plan.views(SCHEDULE, torch.zeros(1, 2, 1, 1))).noisy / level.noise
    query = (torch.tensor([0.3, 0.1]).view(1, 2, 1, 1) - level.noise * eps) / level.signal
    denoised = scored(plan, query, samples).float() @ samples.flatten(1)
    assert ((denoised[0] - monte_carlo).abs() < 4 * error + 0.005).all()
    assert int(near.sum()) > 3000


def test_no_other_weights_of_patches_have_a_smaller_denoising_loss() -> None:
    """The best function from a noisy patch to its middle, among weighted means, is the one by the posterior.

    Patches of one number and two pictures: the loss of weights that are flatter or sharper is larger.
    """
    generator = torch.Generator().manual_seed(1)
    samples = pictures(3, 5)[:, :1]
    level, values = noise_level(SCHEDULE, 500), samples.flatten()
    clean = values[torch.randint(len(values), (200_000,), generator=generator)]
    noisy = level.signal * clean + level.noise * torch.randn(len(clean), generator=generator)
    losses = {}
    for sharper in (0.5, 0.8, 1.0, 1.25, 2.0):
        logits = -((noisy[:, None] - level.signal * values) ** 2) / (2 * level.noise**2)
        losses[sharper] = float(((logits * sharper).softmax(1) @ values - clean).square().mean())
    assert min(losses, key=losses.__getitem__) == 1.0
    plan = PatchPlan((500,), (1,), None)
    view = next(plan.views(SCHEDULE, samples[:1]))
    shares = heat_maps(plan, SCHEDULE, samples[:1], log_partitions(plan, SCHEDULE, samples[:1], [samples]), samples)
    logits = -((view.noisy.flatten()[:, None] - level.signal * values) ** 2) / (2 * level.noise**2)
    expected = logits.double().softmax(1).view(HEIGHT * WIDTH, 3, -1).sum(2)
    torch.testing.assert_close(shares[0].flatten(1).T, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("block", [1, 2, 5, 9])
def test_a_score_is_the_same_alone_in_any_batch_and_with_samples_in_any_blocks(block: int) -> None:
    plan = PatchPlan((100, 400), (3, 4), 3, seed=1)
    queries, samples = pictures(3, 1), pictures(9, 2)
    whole = scored(plan, queries, samples)
    partitions = log_partitions(plan, SCHEDULE, queries, samples.split(block))
    parts = [patch_scores(plan, SCHEDULE, queries, partitions, some) for some in samples.split(block)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-9)
    alone = torch.cat([scored(plan, query[None], samples, block) for query in queries])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-9)


def test_what_is_held_at_once_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, queries, samples = PatchPlan((300,), (3, 4), 2), pictures(2, 1), pictures(40, 2)
    expected = scored(plan, queries, samples)
    monkeypatch.setattr(nda, "_LOGITS_AT_ONCE", 300)
    monkeypatch.setattr(nda, "_PATCHES_AT_ONCE", 2000)
    largest, original = [], nda._logits

    def watched(view: nda.View, some: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
        for found in original(view, some):
            largest.append(found[2].numel())
            yield found

    monkeypatch.setattr(nda, "_logits", watched)
    torch.testing.assert_close(scored(plan, queries, samples), expected, rtol=1e-4, atol=1e-9)
    assert max(largest) <= 300 and len(largest) > 100


def test_a_copy_of_the_query_has_all_influence_where_there_is_little_noise() -> None:
    samples = pictures(5, 2)
    found = scored(PatchPlan((1,), (7,), None), samples[2:3], samples)
    assert found[0, 2] > 0.999


def test_the_copied_half_of_a_picture_is_where_the_heat_map_is_hot() -> None:
    queries, samples = pictures(1, 1), pictures(6, 2)
    samples[4, :, :, :3] = queries[0, :, :, :3]
    plan = PatchPlan((50,), (3,), None)
    maps = heat_maps(plan, SCHEDULE, queries, log_partitions(plan, SCHEDULE, queries, [samples]), samples)
    assert maps.shape == (1, 6, HEIGHT, WIDTH)
    assert maps[0, 4, :, :2].min() > 0.9 and maps[0, 4, :, 4:].mean() < 0.5


def test_pooled_noise_is_of_the_size_of_the_noise_itself() -> None:
    noise = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    inner = PatchScale(2, 2).patches(noise)[:, PatchScale(2, 2).alike(16, 16)[0].numel() :]
    assert PatchScale.of_size(4) == PatchScale(2, 2) and PatchScale.of_size(5) == PatchScale(5, 1)
    middle = inner.unflatten(1, (-1,))[:, 60]
    assert float(middle.std()) == pytest.approx(1.0, abs=0.1)


def test_a_level_is_what_the_schedule_adds() -> None:
    kept = float(SCHEDULE.scheduler.alphas_cumprod[300])
    assert noise_level(SCHEDULE, 300) == pytest.approx((kept**0.5, (1 - kept) ** 0.5), rel=1e-6)
    flow = FlowMatchingSchedule(None, torch.linspace(0.001, 1, 1000))
    assert noise_level(flow, 399) == pytest.approx((0.6, 0.4), abs=1e-6)
