"""The scatter of truth against speed."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from matplotlib.transforms import Bbox
from PIL import Image

from tasks.judging.costs import LATENCY, WHOLE_PASS
from tasks.judging.judge_table import JudgeTable
from tasks.reporting.judged_scatter import _covered, judged_scatter, points_of
from tests.tasks.judging.test_judge_table import row, table

SECONDS = {"teacher": (4.0, 1.0), "sketch": (0.1, 0.0), "untuned": (0.01, 0.0)}


@pytest.fixture
def measured() -> JudgeTable:
    """Three methods with latencies; captions alone have none."""
    rows = [row(LATENCY, name, seconds, split="") for name, (seconds, _) in SECONDS.items()]
    whole = [row(WHOLE_PASS, name, flag, split="") for name, (_, flag) in SECONDS.items()]
    return replace(table(*rows, *whole), rivals=["untuned"])


def test_a_point_is_what_a_method_is_worth_at_the_queries_it_answers_a_second(measured: JudgeTable) -> None:
    found = {point.name: point for point in points_of(measured)}
    assert list(found) == ["sketch", "teacher", "untuned"], "best first; what was not timed has no place"
    assert [found[name].throughput for name in SECONDS] == pytest.approx([0.25, 10, 100])
    assert [found[name].kind for name in SECONDS] == ["teacher", "tier of answers", "rival"]
    assert found["teacher"].whole_pass and not found["sketch"].whole_pass
    assert (found["teacher"].quality, found["teacher"].error) == (0.45, pytest.approx(0.05))


def test_it_names_every_point_and_draws_what_a_score_can_reach(measured: JudgeTable) -> None:
    svg, png = judged_scatter(measured), judged_scatter(measured, "png")
    assert svg is not None and png is not None
    text = svg.decode()
    ET.fromstring(text)
    for words in (*SECONDS, "what a score can reach: 0.84", "queries a second", "LDS on the test queries"):
        assert words in text
    assert Image.open(io.BytesIO(png)).size[0] > 1000
    assert judged_scatter(measured) == svg, "the same table, the same picture"


def test_nothing_is_drawn_of_a_table_without_costs() -> None:
    assert points_of(table()) == [] and judged_scatter(table()) is None


def test_a_number_is_kept_off_what_is_there_and_inside_the_axes() -> None:
    axes = Bbox.from_bounds(0, 0, 100, 100)
    taken = [Bbox.from_bounds(10, 10, 10, 10)]
    assert _covered(Bbox.from_bounds(15, 15, 10, 10), taken, axes) == pytest.approx(25)
    assert _covered(Bbox.from_bounds(30, 30, 10, 10), taken, axes) == 0
    assert _covered(Bbox.from_bounds(95, 30, 10, 10), taken, axes) > 1e5
