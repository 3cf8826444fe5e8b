"""What teachers say that they need, beside what they do."""

from __future__ import annotations

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
