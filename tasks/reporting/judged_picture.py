"""Draw what the judges found: a point for each method, with its errors."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from fastgda_core.extras import installed
from storage_schemas.tables import PSEUDO
from tasks.judging.judge_table import Column, JudgeTable
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
    figure = Figure(figsize=(10.4, 1.3 + 0.27 * len(methods)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, panels, strict=True):
        _draw(axis, column, methods)
        if column.metric == CHANGE:
            _draw_controls(axis, table, column, methods)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    for label, method in zip(axes[0].get_yticklabels(), methods, strict=True):
        label.set_color(_color(method))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _draw(axis: Axes, column: Column, methods: list[str]) -> None:
    """Draw a point for each method: a thick bar is the error over queries, a thin one that over models."""
    for row, method in enumerate(methods):
        if (figure := column.figures.get(method)) is None:
            continue
        for error, width in ((figure.over_models, 1.2), (figure.over_queries, 4.0)):
            if error:
                ends = [figure.value - error, figure.value + error]
                axis.plot(ends, [row, row], color=_color(method), linewidth=width, alpha=0.45, solid_capstyle="butt")
        axis.plot(figure.value, row, "o", color=_color(method), markersize=5)
    if column.reach is not None:
        axis.axvline(column.reach.value, color=_CEILING, linestyle="--", linewidth=1, label="what a score can reach")
        axis.legend(fontsize=7.5, frameon=False, loc="lower right")
    if column.metric == LDS and CAPTIONS in column.figures:
        axis.axvline(column.figures[CAPTIONS].value, color="#a0aec0", linestyle=":", linewidth=1)
    axis.axvline(0, color="#a0aec0", linewidth=0.8)
    axis.set_title(column.title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)


def _draw_controls(axis: Axes, table: JudgeTable, column: Column, methods: list[str]) -> None:
    """Draw what the controls lost beside what the targets did, hollow."""
    controls = next(
        (each for each in table.columns if (each.metric, each.cutoff) == (OF_CONTROLS, column.cutoff)), None
    )
    if controls is None:
        return
    rows = [row for row, method in enumerate(methods) if method in controls.figures]
    values = [controls.figures[methods[row]].value for row in rows]
    axis.plot(values, rows, "o", markerfacecolor="white", color=_OTHER, markersize=5, label="of controls")
    axis.legend(fontsize=7.5, frameon=False, loc="lower right")


def _color(method: str) -> str:
    if method == TEACHER:
        return _TEACHER
    return _TIER if method in (*HEADS.values(), SKETCH) or method.startswith(TWO_STAGES) else _OTHER
