"""Results of a study: a figure for each question and value, and a picture of them."""

from __future__ import annotations

import io
import re
import statistics
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

UNTUNED = "untuned"


@dataclass(frozen=True)
class Answer:
    """Mean mAP(L) on the test queries over the seeds of one value of a question, and their standard deviation."""

    question: str
    value: str
    mean: float
    deviation: float
    seeds: int


def answers(study: pa.Table, cutoff: int) -> list[Answer]:
    """Return the answers in the order of the rows; what untuned features have is a question of its own."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in study.to_pylist():
        if row["metric"] == "mAP" and row["cutoff"] == cutoff and not row["query_id"]:
            question = UNTUNED if row["space"] == UNTUNED else row["question"]
            found.setdefault((question, row["choice"]), []).append(row["value"])
    return [
        Answer(*place, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))
        for place, values in found.items()
    ]


def study_plot(found: list[Answer], cutoff: int, floor: float, ceiling: float | None) -> bytes:
    """Draw a PNG: a panel for each question, with error bars over seeds, the random floor and the teacher's ceiling."""
    from matplotlib.figure import Figure

    questions = [each for each in dict.fromkeys(answer.question for answer in found) if each != UNTUNED]
    columns = 3
    lines = -(-len(questions) // columns)
    figure = Figure(figsize=(12.5, 3.5 * lines), layout="constrained")
    untuned = {answer.value: answer.mean for answer in found if answer.question == UNTUNED}
    for number, question in enumerate(questions):
        axis = figure.add_subplot(lines, columns, number + 1)
        mine = [answer for answer in found if answer.question == question]
        _panel(axis, mine, untuned if question == "feature space" else {})
        axis.axhline(floor, color="#a0aec0", linestyle=":", linewidth=1.2, label="chance")
        if ceiling is not None:
            axis.axhline(ceiling, color="#2f855a", linestyle="--", linewidth=1.2, label="another whole teacher")
        axis.set_title(question, loc="left", fontsize=11, fontweight="bold")
        axis.set_ylim(bottom=0)
        axis.set_ylabel(f"mAP({cutoff})")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        if number == 0:
            axis.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _panel(axis: Any, mine: list[Answer], untuned: dict[str, float]) -> None:
    values = [answer.value for answer in mine]
    means, deviations = [answer.mean for answer in mine], [answer.deviation for answer in mine]
    bars = {"yerr": deviations, "capsize": 3, "color": "#2b6cb0"}
    if all(re.fullmatch(r"[\d.]+", value) for value in values):
        axis.errorbar([float(value) for value in values], means, marker="o", markersize=4, **bars)
        if max(map(float, values)) == 1:
            axis.set_xscale("log", base=2)
            axis.set_xticks([float(value) for value in values], values)
            axis.minorticks_off()
        return
    places = range(len(values))
    width = 0.38 if untuned else 0.6
    axis.bar([place + (width / 2 if untuned else 0) for place in places], means, width, label="tuned", **bars)
    if untuned:
        before = [untuned[value] for value in values]
        axis.bar([place - width / 2 for place in places], before, width, color="#cbd5e0", label="untuned")
    axis.set_xticks(list(places), [value.replace("+", "\n+ ") for value in values], fontsize=8)
