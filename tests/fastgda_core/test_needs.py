"""What teachers say that they need, beside what they do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastgda_core.teachers.needs import GRADIENT_FORWARDS, Work
from fastgda_core.teachers.registry import TEACHERS

WORK = Work(weights=1000, samples=50, noises=4, pairs=10)


@pytest.mark.parametrize("name", TEACHERS)
def test_every_teacher_says_what_it_needs(name: str) -> None:
    needs = TEACHERS[name].needs(WORK)
    numbers = (needs.stored_bytes, needs.sample_forwards, needs.query_forwards, needs.memory_bytes)
    assert all(number >= 0 for number in numbers)


def test_unlearning_teachers_run_all_samples_again_for_a_query() -> None:
    exact, linear = TEACHERS["abu_plus"].needs(WORK), TEACHERS["abu_plus_first_order"].needs(WORK)
    assert exact.query_forwards == 10 * GRADIENT_FORWARDS + 50 * 4 and exact.sample_forwards == 4
    assert linear.query_forwards == pytest.approx((10 + 50 * 4) * GRADIENT_FORWARDS) and not linear.sample_forwards
    assert TEACHERS["similarity"].needs(WORK).query_forwards == 0


def test_teachers_of_gradient_features_store_them_and_run_no_sample_again() -> None:
    trak, dmin = TEACHERS["trak"].needs(WORK), TEACHERS["dmin"].needs(replace(WORK, timesteps=4, images=2))
    assert trak.stored_bytes == 2 * 1000, "no more numbers than weights"
    assert dmin.stored_bytes == 2 * 1000 * 4 * 2
    assert TEACHERS["d_trak"].needs(replace(WORK, weights=10**7, dimensions=64)).stored_bytes == 128
    assert trak.query_forwards == 10 * GRADIENT_FORWARDS and trak.sample_forwards == 4 * GRADIENT_FORWARDS
    journey = TEACHERS["journey_trak"].needs(replace(WORK, sampler_steps=25))
    assert journey.query_forwards == trak.query_forwards + 50
    assert "kernel" in trak.fits and "kernel" not in dmin.fits


def test_an_ascent_takes_its_steps_and_then_the_losses_of_all_samples() -> None:
    mucs = TEACHERS["mucs"].needs(replace(WORK, ascent_steps=30))
    assert mucs.query_forwards == pytest.approx(30 * 2 * 10 * 2.6 + 50 * 4), "a backward to the MLPs takes more"
    longer = TEACHERS["mucs"].needs(replace(WORK, ascent_steps=500))
    assert longer.query_forwards == pytest.approx(60 * 2 * 10 * 2.6 + 50 * 4), "the bound ends it long before"
    assert mucs.stored_bytes == 8 * 4, "a base loss at each noise"
