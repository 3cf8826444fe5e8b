"""Draw what methods are worth against how fast they answer, as Figure 1 of FastGDA (arXiv 2511.10721) does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from typing import TYPE_CHECKING, Literal

from fastgda_core.evaluation.ensembles import BEST
from fastgda_core.extras import installed
from tasks.judging.costs import LATENCY
from tasks.judging.judge_table import REACH, JudgeTable
from tasks.judging.sketches import SKETCH
from tasks.judging.tiers import HEADS, TWO_STAGES
from tasks.watching.trust import LDS, TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# By kind of method: marker, colour. Kinds are told apart without colours, too.
STYLES = {
    "teacher": ("s", "#2b6cb0"),
    "rival": ("o", "#c05621"),
    "tier of answers": ("D", "#2f855a"),
    "features": ("^", "#4a5568"),
    "sum of the best": ("*", "#6b46c1"),
}
_CEILING = "#c53030"
_RADII, _DIRECTIONS = (10.0, 15.0, 21.0, 28.0, 36.0), 16  # points from a marker at which its number may stand


@dataclass(frozen=True)
class Point:
    """A method: queries a second, LDS on the test queries and its error, whether the model looks at all samples."""

    name: str
    kind: str
    throughput: float
    quality: float
    error: float
    whole_pass: bool


def points_of(table: JudgeTable) -> list[Point]:
    """Return the methods whose quality and latency are known, best first."""
    judged, latency = table.find(LDS), table.find(LATENCY, "")
    if judged is None or latency is None:
        return []
    found = []
    for name in table.methods:
        quality, taken = judged.figures.get(name), latency.figures.get(name)
        if quality is not None and taken is not None and taken.value > 0:
            kind = _kind(name, table.rivals)
            found.append(Point(name, kind, 1 / taken.value, quality.value, quality.error, taken.whole_pass))
    return found


def _kind(name: str, rivals: Sequence[str]) -> str:
    if name in rivals:
        return "rival"
    if name in (*HEADS.values(), SKETCH) or name.startswith(TWO_STAGES):
        return "tier of answers"
    return "teacher" if name == TEACHER else "sum of the best" if name.startswith(BEST) else "features"


def judged_scatter(table: JudgeTable, form: Literal["svg", "png"] = "svg") -> bytes | None:
    """Draw a numbered point for each method with its error, the ceiling, and the names beside them.

    Returns:
        None where matplotlib is missing, or nothing was measured.
    """
    points = points_of(table)
    if not installed("matplotlib") or not points:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, max(5.6, 1.6 + 0.2 * len(points))))
    axis = figure.add_axes((0.065, 0.1, 0.535, 0.84))
    axis.set_xscale("log")
    axis.margins(0.12, 0.08)
    _draw(axis, points)
    judged = table.find(LDS)
    if judged is not None and judged.reach is not None:
        axis.axhline(judged.reach.value, color=_CEILING, linestyle="--", linewidth=1)
        axis.annotate(
            f"{REACH}: {judged.reach.value:.2f}", (1, judged.reach.value), xycoords=("axes fraction", "data"),
            xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8, color=_CEILING,
        )  # fmt: skip
    axis.set(xlabel="queries a second", ylabel="LDS on the test queries")
    axis.set_title("Truth against speed, by method", fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    _number(figure, axis, points)
    _name(figure, points)
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if form == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "fastgda"}):  # else each drawing names its parts anew
        figure.savefig(buffer, format=form, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _draw(axis: Axes, points: Sequence[Point]) -> None:
    for point in points:
        marker, color = STYLES[point.kind]
        place = point.throughput, point.quality
        axis.errorbar(*place, yerr=point.error, color=color, alpha=0.3, linewidth=1, capsize=0, zorder=1)
        face = "white" if point.whole_pass else color
        size = 11 if marker == "*" else 6.5
        axis.plot(*place, marker, color=color, markerfacecolor=face, markersize=size, markeredgewidth=1.4, zorder=2)


def _number(figure: Figure, axis: Axes, points: Sequence[Point]) -> None:
    """Write each point's number beside it, where it covers neither points nor other numbers."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    scale = figure.dpi / 72
    places = axis.transData.transform([(point.throughput, point.quality) for point in points])
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in places]
    inside = axis.get_window_extent()
    for number, (x, y) in enumerate(places, start=1):
        width, height = (5 + 5 * len(str(number))) * scale, 10 * scale
        options = []
        for radius in _RADII:
            for turn in range(_DIRECTIONS):
                angle = pi / 4 + 2 * pi * turn / _DIRECTIONS
                left, low = radius * cos(angle), radius * sin(angle)
                box = Bbox.from_bounds(x + left * scale - width / 2, y + low * scale - height / 2, width, height)
                options.append((_covered(box, taken, inside), left, low, box))
        _, left, low, box = min(options, key=lambda option: option[0])
        taken.append(box)
        line = {"arrowstyle": "-", "color": "#4a5568", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
        far = (left**2 + low**2) ** 0.5 > _RADII[0] + 1
        axis.annotate(
            str(number), (points[number - 1].throughput, points[number - 1].quality), xytext=(left, low),
            textcoords="offset points", ha="center", va="center", fontsize=8, zorder=3,
            arrowprops=line if far else None,
        )  # fmt: skip


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """Return the area of other boxes that a box covers; much where it leaves the axes."""
    from matplotlib.transforms import Bbox

    out = not (inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1))
    both = (Bbox.intersection(box, other) for other in taken)
    return 1e6 * out + sum(each.width * each.height for each in both if each is not None)


def _name(figure: Figure, points: Sequence[Point]) -> None:
    """List the points' names and figures, best first, and what the markers mean."""
    axis = figure.add_axes((0.63, 0.02, 0.36, 0.96))
    axis.set_axis_off()
    kinds = [kind for kind in STYLES if any(point.kind == kind for point in points)]
    rows = len(points) + len(kinds) + 3
    axis.set(xlim=(0, 1), ylim=(rows, -1))
    for row, point in enumerate(points):
        marker, color = STYLES[point.kind]
        axis.text(0.04, row, str(row + 1), fontsize=8, ha="right", va="center")
        face = "white" if point.whole_pass else color
        axis.plot(0.075, row, marker, color=color, markerfacecolor=face, markersize=5.5, markeredgewidth=1.2)
        axis.text(0.11, row, _short(point.name), fontsize=8, va="center")
        axis.text(1, row, f"{point.quality:.2f} ± {point.error:.2f}", fontsize=8, ha="right", va="center")
    for row, kind in enumerate(kinds, start=len(points) + 1):
        marker, color = STYLES[kind]
        axis.plot(0.075, row, marker, color=color, markersize=5.5)
        axis.text(0.11, row, kind, fontsize=8, va="center", color="#4a5568")
    axis.text(
        0.04, rows - 1, "hollow: a whole pass of the model over all samples", fontsize=8, va="center", color="#4a5568"
    )


def _short(name: str, most: int = 46) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
