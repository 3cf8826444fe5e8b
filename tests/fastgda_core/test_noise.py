from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from fastgda_core.diffusion.noise import (
    MAX_CAPTIONS,
    MAX_DRAWS,
    MAX_TIMESTEPS,
    MAX_TRAIN_ID,
    NoisePlan,
    gaussian_noise,
    philox,
    stream_key,
    uniform,
)
from fastgda_core.errors import UsageError

KEY = stream_key(0, "training samples")
SHAPE = (4, 5, 3)

# Random123, tests/kat_vectors: "philox4x32 10".
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

row = st.tuples(
    st.integers(0, MAX_TRAIN_ID - 1),
    st.integers(0, MAX_TIMESTEPS - 1),
    st.integers(0, MAX_DRAWS - 1),
    st.integers(0, MAX_CAPTIONS - 1),
    st.integers(0, 1),
)


def noise_of(rows: list[tuple[int, ...]], key: tuple[int, int] = KEY, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    owners, timesteps, draws, captions, flips = torch.tensor(rows).T
    return gaussian_noise(key, owners, timesteps, draws, shape, captions=captions, flips=flips)


def plan_noise(plan: NoisePlan, rows: list[tuple[int, ...]]) -> torch.Tensor:
    owners, timesteps, draws, captions, flips = torch.tensor(rows).T
    return plan.noise(owners, flips, captions, timesteps, draws, SHAPE)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in words) == expected


def test_philox_gives_the_known_answers_side_by_side_under_one_key() -> None:
    counter, key, expected = KNOWN_ANSWERS[2]
    words = philox(tuple(torch.tensor([0, word, 1]) for word in counter), key)
    assert tuple(word[1].item() for word in words) == expected


def test_plan_with_more_than_can_be_told_apart_is_refused() -> None:
    with pytest.raises(UsageError, match=r"teacher\.draws is 65,537"):
        NoisePlan(seed=0, timesteps=1, draws=MAX_DRAWS + 1)
    with pytest.raises(UsageError, match=r"schedule has 65,537 timesteps"):
        NoisePlan(seed=0, timesteps=1, draws=1).timestep_values(MAX_TIMESTEPS + 1)


@pytest.mark.heavy
@settings(max_examples=60)
@given(st.lists(row, min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_noise_is_the_same_alone_in_any_batch_and_in_any_order(rows: list[tuple[int, ...]], random: Random) -> None:
    together = noise_of(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    assert torch.equal(noise_of([rows[place] for place in order]), together[order])
    for number, one in enumerate(rows):
        assert torch.equal(noise_of([one])[0], together[number])


@settings(max_examples=60)
@given(st.lists(row, min_size=2, max_size=9, unique=True))
def test_noise_of_different_rows_differs(rows: list[tuple[int, ...]]) -> None:
    noise = noise_of(rows).flatten(1)
    assert len(torch.unique(noise, dim=0)) == len(rows)


@pytest.mark.parametrize("place", range(5), ids=["train_id", "timestep", "draw", "caption", "flip"])
def test_noise_changes_with_each_thing_it_is_for(place: int) -> None:
    base = [12, 300, 1, 1, 0]
    other = list(base)
    other[place] += 1
    first, second = noise_of([tuple(base), tuple(other)])
    # Independent tensors share no number, up to the granularity of 24-bit uniforms.
    assert (first == second).float().mean() < 0.05


def test_noise_changes_with_the_plan_seed_and_the_purpose() -> None:
    one = [(12, 300, 1, 1, 0)]
    first, second = (plan_noise(NoisePlan(seed=seed, timesteps=4, draws=1), one) for seed in (0, 1))
    third = noise_of(one, stream_key(0, "generation"))
    assert torch.equal(first, noise_of(one))
    assert (first == second).float().mean() < 0.05
    assert (first == third).float().mean() < 0.05


def test_noise_of_train_ids_beyond_32_bits_differs() -> None:
    ids = [7, 2**32 + 7, 2**33 + 7, 2**47 + 7, 2**47 + 2**32 + 7]
    noise = noise_of([(train_id, 0, 0, 0, 0) for train_id in ids]).flatten(1)
    assert len(torch.unique(noise, dim=0)) == len(ids)


def test_first_numbers_of_a_tensor_do_not_depend_on_its_size() -> None:
    one = [(12, 300, 1, 1, 0)]
    assert torch.equal(noise_of(one, shape=(3,))[0], noise_of(one, shape=(11,))[0, :3])


def test_noise_is_standard_normal() -> None:
    noise = noise_of([(train_id, 10 * train_id, 0, 0, 0) for train_id in range(100)], shape=(4, 16, 16))
    assert noise.dtype == torch.float32
    assert kstest(noise.double().flatten().numpy(), "norm").pvalue > 0.01
    # Neighbours in a tensor, and the same place in neighbouring tensors, are uncorrelated (5 standard errors).
    flat = noise.double().flatten(1)
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 5 / math.sqrt(flat.numel())
    assert abs((flat[1:] * flat[:-1]).mean()) < 5 / math.sqrt(flat.numel())


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    numbers = uniform(KEY, 2**40 + 3, 20_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert kstest(numbers.double().numpy(), "uniform").pvalue > 0.01
    assert torch.equal(uniform(KEY, 2**40 + 3, 7), numbers[:7])
    assert not torch.equal(uniform(KEY, 3, 7), numbers[:7])


@pytest.mark.parametrize(
    ("train_timesteps", "timesteps", "expected"),
    [(1000, 5, [0, 200, 400, 600, 800]), (100, 3, [0, 33, 66, 99]), (7, 7, list(range(7))), (10, 1, [0])],
)
def test_plan_takes_evenly_spaced_timesteps(train_timesteps: int, timesteps: int, expected: list[int]) -> None:
    assert NoisePlan(seed=0, timesteps=timesteps, draws=1).timestep_values(train_timesteps).tolist() == expected


def test_plan_may_start_its_timesteps_later() -> None:
    plan = NoisePlan(seed=0, timesteps=5, draws=1, first_timestep=175)
    assert plan.timestep_values(1000).tolist() == [175, 375, 575, 775, 975]


@pytest.mark.parametrize(
    ("timesteps", "first", "message"), [(1001, 0, "schedule has 1000"), (5, 200, "below the stride, 200")]
)
def test_plan_that_the_schedule_cannot_hold_is_refused(timesteps: int, first: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NoisePlan(seed=0, timesteps=timesteps, draws=1, first_timestep=first).timestep_values(1000)


@pytest.mark.heavy
@settings(max_examples=60)
@given(st.lists(row, min_size=1, max_size=9), st.booleans())
def test_noise_of_a_plan_is_the_same_alone_and_in_any_batch(rows: list[tuple[int, ...]], antithetic: bool) -> None:
    plan = NoisePlan(seed=3, timesteps=4, draws=2, antithetic=antithetic)
    together = plan_noise(plan, rows)
    for number, one in enumerate(rows):
        assert torch.equal(plan_noise(plan, [one])[0], together[number])


def test_antithetic_draws_come_in_pairs_of_opposite_sign() -> None:
    plan = NoisePlan(seed=3, timesteps=4, draws=5, antithetic=True)
    draws = plan_noise(plan, [(12, 300, draw, 1, 0) for draw in range(5)])
    assert torch.equal(draws[1], -draws[0])
    assert torch.equal(draws[3], -draws[2])
    # Pairs are independent of each other, and the last draw, without a partner, is new too.
    for first, second in ((0, 2), (0, 4), (2, 4)):
        assert (draws[first].abs() == draws[second].abs()).float().mean() < 0.05
    assert torch.equal(draws[0], plan_noise(NoisePlan(seed=3, timesteps=4, draws=5), [(12, 300, 0, 1, 0)])[0])


def test_plan_takes_the_timesteps_that_are_listed() -> None:
    plan = NoisePlan(seed=0, timesteps=(3, 50, 99), draws=1)
    assert plan.timestep_values(100).tolist() == [3, 50, 99]


def test_listed_timestep_beyond_the_schedule_is_refused() -> None:
    with pytest.raises(UsageError, match=r"timestep_list has 100 but the model's schedule ends at 99"):
        NoisePlan(seed=0, timesteps=(3, 100), draws=1).timestep_values(100)


def test_weights_keep_their_ratios_and_have_a_mean_of_one() -> None:
    weights = NoisePlan(seed=0, timesteps=(1, 2, 3), draws=1, weights=(1.0, 2.0, 5.0)).timestep_weights(3)
    assert weights.tolist() == pytest.approx([3 / 8, 6 / 8, 15 / 8])
    assert NoisePlan(seed=0, timesteps=4, draws=1).timestep_weights(4).tolist() == [1, 1, 1, 1]
