"""Draw what the judges found: a point for each method, with its errors."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from fastgda_core.extras import installed
from storage_schemas.tables import PSEUDO
from tasks.judging.judge_table import REACH, Column, JudgeTable
from tasks.judging.left_out import CHANGE, OF_CONTROLS
from tasks.judging.sketches import SKETCH
from tasks.judging.tiers import HEADS, TWO_STAGES
from tasks.watching.trust import CAPTIONS, LDS, TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NO_PICTURE = "no picture of the judges: matplotlib is not installed: pip install 'fastgda[report]'"
_TEACHER, _TIER, _OTHER, _CEILING = "#2b6cb0", "#2f855a", "#718096", "#c53030"


def judged_picture(table: JudgeTable) -> str | None:
    """Draw the LDS of every method with both errors and what a score can reach, and losses without what was named.

    Returns:
        An SVG; None where matplotlib is missing, or no test query was judged.
    """
    judged = table.find(LDS)
    if not installed("matplotlib") or judged is None:
        return None
    from matplotlib.figure import Figure

    panels = [column for column in (judged, table.find(LDS, PSEUDO), table.find(CHANGE)) if column is not None]
    methods = table.methods
    figure = Figure(figsize=(10.4, 1.6 + 0.27 * len(methods)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, panels, strict=True):
        _draw(axis, column, methods)
        if column.metric == CHANGE:
            _draw_controls(axis, table, column, methods)
        axis.set_title(f"{column.name}, {column.asked}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    for label, method in zip(axes[0].get_yticklabels(), methods, strict=True):
        label.set_color(_color(method))
    shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown), fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _draw(axis: Axes, column: Column, methods: list[str]) -> None:
    """Draw a point for each method: a broad bar is the error over queries, a thin one that over models."""
    axis.axvline(0, color="#a0aec0", linewidth=0.8)
    for row, method in enumerate(methods):
        if (figure := column.figures.get(method)) is None:
            continue
        color, value = _color(method), figure.value
        for label, error, width, alpha in (
            ("error over queries", figure.over_queries, 7.0, 0.3),
            ("error over models", figure.over_models, 1.3, 1.0),
        ):
            if error:
                (bar,) = axis.plot(
                    [value - error, value + error], [row, row], color=color, linewidth=width, alpha=alpha
                )
                bar.set(solid_capstyle="butt", label=label)
        axis.plot(value, row, "o", color=color, markersize=4)
    if column.metric == LDS and CAPTIONS in column.figures:
        captions = column.figures[CAPTIONS].value
        axis.axvline(captions, color=_OTHER, linestyle=":", linewidth=1, label=CAPTIONS)
    if column.reach is not None:
        axis.axvline(column.reach.value, color=_CEILING, linestyle="--", linewidth=1, label=REACH)


def _draw_controls(axis: Axes, table: JudgeTable, column: Column, methods: list[str]) -> None:
    """Draw what the controls lost beside what the targets did, hollow."""
    of_controls = (each for each in table.columns if (each.metric, each.cutoff) == (OF_CONTROLS, column.cutoff))
    controls = next(of_controls, None)
    if controls is None:
        return
    rows = [row for row, method in enumerate(methods) if method in controls.figures]
    values = [controls.figures[methods[row]].value for row in rows]
    axis.plot(values, rows, "o", markerfacecolor="white", color=_OTHER, markersize=5, label=OF_CONTROLS)


def _color(method: str) -> str:
    if method == TEACHER:
        return _TEACHER
    return _TIER if method in (*HEADS.values(), SKETCH) or method.startswith(TWO_STAGES) else _OTHER
