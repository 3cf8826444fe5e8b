"""The table of the judges: figures with their errors, the best marked by the rule, and what is doubtful."""

from __future__ import annotations

from math import hypot
from typing import Any

import pytest

from fastgda_core.evaluation.twins import TwinTest
from storage_schemas.tables import PSEUDO, TWIN
from tasks.judging.judge_table import REACH, JudgeTable, figures_of, table_of
from tasks.judging.leave_k_out import BRITTLENESS, OWN_CHANGE
from tasks.judging.left_out import CHANGE, OF_CONTROLS
from tasks.judging.metric_rows import twin_rows
from tasks.judging.retrained import AHEAD, BESIDE_TEACHER, HIGH, LOW, OVER_MODELS
from tasks.watching.trust import CAPTIONS, LDS, RETRAINED_AGAIN, TEACHER

WITHOUT = "Models trained without what a method named"


def row(metric: str, space: str, value: float, error: float = 0.0, **where: Any) -> dict[str, Any]:
    whole = {"split": "test", "cutoff": 0, "query_id": "", "queries": 16, **where}
    return {"metric": metric, "space": space, "value": value, "standard_error": error, **whole}


def judged(space: str, value: float, errors: tuple[float, float], **where: Any) -> list[dict[str, Any]]:
    beside = {OVER_MODELS: errors[1], LOW: value - 0.1, HIGH: value + 0.1}
    return [
        row(LDS, space, value, errors[0], **where),
        *(row(each, space, number, **where) for each, number in beside.items()),
    ]


def leading(lead: float, errors: tuple[float, float]) -> list[dict[str, Any]]:
    return [row(AHEAD, TEACHER, lead, errors[0]), row(f"{AHEAD}, error over models", TEACHER, errors[1])]


ROWS = [
    *judged(TEACHER, 0.45, (0.03, 0.04)),
    *judged("sketch", 0.47, (0.03, 0.04)),
    *judged("untuned", 0.43, (0.5, 0.5)),
    *judged(CAPTIONS, 0.32, (0.05, 0.04)),
    *judged(TEACHER, 0.74, (0.02, 0.02), split=PSEUDO, queries=12),
    row(LDS, RETRAINED_AGAIN, 0.84, 0.03),
    *leading(0.13, (0.04, 0.03)),
    row(BESIDE_TEACHER, "sketch", 0.02, 0.01),
    row(f"{BESIDE_TEACHER}, error over models", "sketch", 0.03),
    row(LDS, TEACHER, 0.99, query_id="q0001"),
]


def table(*more: dict[str, Any]) -> JudgeTable:
    found = table_of([*ROWS, *more])
    assert found is not None
    return found


def test_the_best_of_a_judge_is_marked_and_what_is_within_both_its_errors() -> None:
    column = table().find(LDS)
    assert column is not None and column.reach is not None
    places = {name: figure.place for name, figure in column.figures.items()}
    assert hypot(0.03, 0.04) == pytest.approx(0.05)
    assert places == {"sketch": "best", TEACHER: "close", "untuned": "close", CAPTIONS: ""}
    assert column.figures[TEACHER].error == pytest.approx(0.05)
    assert column.text(TEACHER) == "0.45 ± 0.03 ± 0.04 (0.35 to 0.55)"
    beside = table().find(BESIDE_TEACHER)
    assert beside is not None and (beside.text("sketch"), beside.place("sketch")) == ("0.02 ± 0.01 ± 0.03", "")
    assert (column.text(REACH), column.text("nobody")) == ("0.84 ± 0.03", "")
    assert table().methods == ["sketch", TEACHER, "untuned", CAPTIONS]


def test_an_error_of_nought_is_written_where_there_are_two() -> None:
    column = table(*judged("pixel", -0.001, (0.0, 0.67)), row("R-precision", TEACHER, 0.5)).find(LDS)
    assert column is not None and column.text("pixel").startswith("0.00 ± 0.00 ± 0.67 (")
    alone = table(row("R-precision", TEACHER, 0.5)).find("R-precision")
    assert alone is not None and alone.text(TEACHER) == "0.50"


def test_where_less_is_better_the_lowest_is_best() -> None:
    removed = {
        "mean squared error of regenerations": {TEACHER: 0.9, "random": 0.1},
        "similarity of regenerations": {TEACHER: 0.2, "random": 0.8},
        OF_CONTROLS: {TEACHER: 0.4, "random": 0.2},
    }
    more = [row(metric, name, value, cutoff=40) for metric, of in removed.items() for name, value in of.items()]
    best = {
        column.metric: [name for name, figure in column.figures.items() if figure.place == "best"]
        for column in table(*more).columns
        if column.cutoff
    }
    assert best == {
        "mean squared error of regenerations": [TEACHER],
        "similarity of regenerations": [TEACHER],
        OF_CONTROLS: [],
    }


def test_a_judge_is_what_the_teacher_itself_has_a_figure_by() -> None:
    other = [row("mAP", "tuned", 0.9, cutoff=40), row("spearman", "another teacher", 0.9)]
    assert {column.metric for column in table(*other).columns} == {LDS, AHEAD, BESIDE_TEACHER}
    assert table_of(other) is None, "nothing was trained again"
    assert table_of([row("twin share", TEACHER, 1.0, split=TWIN)]) is None


def test_columns_are_read_together_under_what_they_share() -> None:
    removals = [row(CHANGE, TEACHER, 1.0, 0.1, cutoff=k) for k in (100, 40)]
    twins = [*twin_rows(TwinTest((1, 9), (4, 4)), TEACHER, TWIN), row("R-precision", TEACHER, 0.5)]
    alone = [row(OWN_CHANGE, TEACHER, 1.0, 0.1, cutoff=10), row(BRITTLENESS, TEACHER, 10.0, 0.0)]
    sections = {section.shared: section for section in table(*removals, *twins, *alone).sections}
    assert {title: section.heads for title, section in sections.items()} == {
        "Models trained on random subsets, test queries": ["LDS", "ahead of captions", "ahead of the teacher"],
        "Models trained on random subsets, other queries: LDS, training images as queries": ["LDS"],
        f"{WITHOUT} for several queries, test queries": ["loss change, k = 40", "loss change, k = 100"],
        f"{WITHOUT} for one query, test queries": ["leave-k-out brittleness", "leave-k-out loss change, k = 10"],
        "Without training": ["R-precision, test queries", "twins found, generated from training captions"],
    }
    (_, twins_found) = sections["Without training"].columns
    assert twins_found.text(TEACHER) == "1 of 2, worst at rank 9"
    assert sections[f"{WITHOUT} for several queries, test queries"].methods == [TEACHER]


@pytest.mark.parametrize(("lead", "doubted"), [(0.11, False), (0.09, True), (-0.2, True)])
def test_a_teacher_that_is_not_ahead_of_captions_by_two_errors_is_doubted(lead: float, doubted: bool) -> None:
    doubts = table(*leading(lead, (0.04, 0.03))).doubts
    assert len(doubts) == doubted
    assert not doubted or f"ahead of captions alone by {lead:.2f} ± 0.04 ± 0.03 on 16 test queries" in doubts[0]


def test_a_file_for_programs_has_every_figure_with_all_its_digits() -> None:
    rows = list(figures_of(table()))
    of_teacher = next(each for each in rows if each["method"] == TEACHER and each["judge"] == LDS)
    assert of_teacher == {
        "method": TEACHER, "judge": LDS, "split": "test", "k": None, "value": 0.45, "error_over_queries": 0.03,
        "error_over_models": 0.04, "low": 0.45 - 0.1, "high": 0.45 + 0.1, "queries": 16, "worst_rank": None,
        "place": "close", "whole_pass": False,
    }  # fmt: skip
    assert {each["method"] for each in rows if each["judge"] == LDS} == {TEACHER, "sketch", "untuned", CAPTIONS, REACH}
