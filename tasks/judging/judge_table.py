"""The table of the judges: what each says of each method, the best ones marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import hypot
from typing import Any

from rich.filesize import decimal

from fastgda_core.evaluation.counterfactual import compared
from storage_schemas import tables
from storage_schemas.commit import read_manifest
from storage_schemas.heads.records import check_tables
from storage_schemas.runs.rivals import read_rivals
from storage_schemas.workspace import Workspace
from tasks.judging.costs import COSTS, LATENCY, PREPARED, STORED, WHOLE_PASS
from tasks.judging.kept_checks import read_checks
from tasks.judging.leave_k_out import OWN
from tasks.judging.retrained import AHEAD, BESIDE_TEACHER, HIGH, LOW, OVER_MODELS
from tasks.watching.status_text import duration
from tasks.watching.trust import (
    CAPTIONS,
    CONFIRMED_SHARE,
    KINDS,
    LDS,
    RETRAINED_AGAIN,
    TEACHER,
    TWIN_SHARE,
    WORST_TWIN,
)

Means = Mapping[tuple[str, str, str, int], Mapping[str, Any]]  # by metric, method, split and cutoff

REACH = "what a score can reach"
COSTS_SHOWN = PREPARED, STORED, LATENCY
ENOUGH = 2.0  # errors by which a teacher has to be ahead of captions
# Nothing is better for it alone: a random removal hurts controls least, and targets too.
UNMARKED = "of controls", BESIDE_TEACHER, *COSTS_SHOWN
OF_SPLITS = {"test": "test queries", **KINDS, "validation": "validation queries"}  # in this order
_NAMES = {
    LDS: "LDS",
    AHEAD: "ahead of captions",
    BESIDE_TEACHER: "ahead of the teacher",
    TWIN_SHARE: "twins found",
    CONFIRMED_SHARE: "twins found that retraining confirms",
    PREPARED: "to prepare",
    STORED: "kept, a sample",
    LATENCY: "a new query",
}
_BESIDE, _OTHER_ERROR = (
    (OVER_MODELS, LOW, HIGH, WORST_TWIN, WHOLE_PASS),
    ", error over models",
)  # shown with another figure


@dataclass(frozen=True)
class Figure:
    """What one judge says of one method.

    over_queries, over_models: standard errors; the second is None where all queries are of the same models.
    interval: 95 % of pools of models, or None.
    worst: rank of the worst twin, where twins are looked for.
    whole_pass: the model looks at every sample anew, where this is a latency.
    place: "best", "close" (within one standard error of it, of both kinds together) or "".
    """

    value: float
    over_queries: float
    over_models: float | None
    interval: tuple[float, float] | None
    queries: int
    worst: float | None = None
    whole_pass: bool = False
    place: str = ""

    @property
    def error(self) -> float:
        """Both standard errors together: queries and models are drawn independently."""
        return hypot(self.over_queries, self.over_models or 0.0)


@dataclass(frozen=True)
class Column:
    """A judge: a metric on the queries of a split, at a cutoff (0: it has none), with its figures by method.

    reach: the highest value that a method could have, where that is known.
    """

    metric: str
    split: str
    cutoff: int
    figures: Mapping[str, Figure]
    reach: Figure | None = None

    @property
    def name(self) -> str:
        """The metric with its cutoff, as a heading."""
        named = _NAMES.get(self.metric, self.metric)
        return f"{named}, k = {self.cutoff}" if self.cutoff else named

    @property
    def asked(self) -> str:
        """The queries, as a heading."""
        return OF_SPLITS.get(self.split, self.split)

    def text(self, method: str) -> str:
        """Return the figure of a method as people read it; empty where it has none."""
        figure = self.reach if method == REACH else self.figures.get(method)
        if figure is None:
            return ""
        if self.metric in COSTS_SHOWN:
            return _cost_text(self.metric, figure)
        if self.metric in (TWIN_SHARE, CONFIRMED_SHARE):
            found = f"{figure.value * figure.queries:.0f} of {figure.queries}"
            return found if figure.worst is None else f"{found}, worst at rank {figure.worst:,.0f}"
        errors = [figure.over_queries] if figure.over_queries or figure.over_models is not None else []
        errors += [figure.over_models] if figure.over_models is not None else []
        words = " ± ".join(f"{round(each, 2) + 0.0:.2f}" for each in (figure.value, *errors))  # no -0.00
        if figure.interval and (self.metric, self.split) == (LDS, "test"):
            words += " ({:.2f} to {:.2f})".format(*figure.interval)
        return words

    def place(self, method: str) -> str:
        return self.figures[method].place if method in self.figures else ""


@dataclass(frozen=True)
class Section:
    """Columns that are read together, with the methods that have a figure in one of them, best first."""

    title: str
    columns: Sequence[Column]
    methods: Sequence[str]

    @property
    def heads(self) -> list[str]:
        """A heading for each column, without what all of them share, which is in `shared`."""
        names, asked = ({getattr(each, part) for each in self.columns} for part in ("name", "asked"))
        if len(asked) == 1:
            return [each.name for each in self.columns]
        return [each.asked if len(names) == 1 else f"{each.name}, {each.asked}" for each in self.columns]

    @property
    def shared(self) -> str:
        """The title, with the metric and the queries where all columns have the same."""
        names, asked = ({getattr(each, part) for each in self.columns} for part in ("name", "asked"))
        metric = f": {names.pop()}" if len(names) == 1 else ""
        queries = asked.pop() if len(asked) == 1 else ""
        return f"{self.title}{metric}, {queries}" if queries else f"{self.title}{metric}"


@dataclass(frozen=True)
class JudgeTable:
    """All judges of a run's teacher and of what stands beside it.

    rivals: the names of those that were scored; lacking: why others have no scores, by name.
    machine: where costs were measured; empty where they were not.
    """

    columns: Sequence[Column]
    rivals: Sequence[str] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""

    def find(self, metric: str, split: str = "test") -> Column | None:
        """Return the first column of a metric on a split."""
        return next((each for each in self.columns if (each.metric, each.split) == (metric, split)), None)

    @property
    def methods(self) -> list[str]:
        """The methods in the order of their LDS on the test queries; those without one come last."""
        names = dict.fromkeys(name for column in self.columns for name in column.figures)
        judged = self.find(LDS)
        scores = {name: figure.value for name, figure in judged.figures.items()} if judged else {}
        return sorted(names, key=lambda name: -scores.get(name, float("-inf")))

    @property
    def sections(self) -> list[Section]:
        """The columns in groups that a page has room for."""
        scores, (first, *others) = (LDS, AHEAD, BESIDE_TEACHER), OF_SPLITS
        rest = [each for each in self.columns if each.metric not in (*scores, *COSTS_SHOWN)]
        groups = {
            "Models trained on random subsets": _chosen(self.columns, scores, [first]),
            "Models trained on random subsets, other queries": _chosen(self.columns, [LDS], others),
            "Models trained without what a method named for several queries": [
                each for each in rest if each.cutoff and not each.metric.startswith(OWN)
            ],
            "Models trained without what a method named for one query": [
                each for each in rest if each.metric.startswith(OWN)
            ],
            "Without training": [each for each in rest if not each.cutoff and not each.metric.startswith(OWN)],
            "What it costs": [each for each in self.columns if each.metric in COSTS_SHOWN],
        }
        return [
            Section(title, columns, [name for name in self.methods if any(name in each.figures for each in columns)])
            for title, columns in groups.items()
            if columns
        ]

    @property
    def doubts(self) -> list[str]:
        """A warning where the teacher is not ahead of captions alone by two errors on the test queries."""
        ahead = self.find(AHEAD)
        if ahead is None or TEACHER not in ahead.figures:
            return []
        lead = ahead.figures[TEACHER]
        if lead.value >= ENOUGH * lead.error:
            return []
        return [
            f"the teacher is ahead of {CAPTIONS} by {ahead.text(TEACHER)} on {lead.queries} test queries (errors over "
            "queries and models), which is less than two errors: it may say no more than they do"
        ]


def _chosen(columns: Sequence[Column], metrics: Sequence[str], splits: Sequence[str]) -> list[Column]:
    return [each for each in columns if each.metric in metrics and each.split in splits]


def judge_table(workspace: Workspace, run: str) -> JudgeTable | None:
    """Read what the judges of a run have found so far; None where no model was trained again for it."""
    rows: list[dict[str, Any]] = []
    for path in check_tables(workspace, run):
        rows += tables.read(path, tables.METRICS).to_pylist()
    costs = next((check for check in read_checks(workspace, run) if check.name == COSTS), None)
    manifest = read_manifest(costs.path) if costs is not None else None
    found, known = table_of(rows), read_rivals(workspace, run)
    if found is None:
        return None
    scored = [name for name, rival in known.items() if rival.snapshot]
    return replace(
        found,
        rivals=scored,
        lacking={name: rival.failed for name, rival in known.items() if not rival.snapshot},
        machine=manifest.device if manifest is not None else "",
    )


def table_of(rows: Sequence[Mapping[str, Any]]) -> JudgeTable | None:
    """Return the table of rows of `metrics`; None where none is of models that were trained again.

    A metric is a judge's where the teacher itself has a figure by it, or others have one beside the teacher's.
    Agreement with the teacher is none.
    """
    means = {(row["metric"], row["space"], row["split"], row["cutoff"]): row for row in rows if not row["query_id"]}
    judges = [
        (metric, split, cutoff)
        for metric, space, split, cutoff in means
        if (space == TEACHER or metric == BESIDE_TEACHER)
        and metric not in _BESIDE
        and not metric.endswith(_OTHER_ERROR)
    ]
    if not any(metric == LDS for metric, _, _ in judges):
        return None
    return JudgeTable([_column(means, *judge) for judge in sorted(dict.fromkeys(judges), key=_order)])


def _order(judge: tuple[str, str, int]) -> tuple[int, int, int]:
    metric, split, cutoff = judge
    first = [LDS, AHEAD, BESIDE_TEACHER, *COSTS_SHOWN]
    splits = list(OF_SPLITS)
    return (
        first.index(metric) if metric in first else len(first),
        cutoff,
        splits.index(split) if split in splits else len(splits),
    )


def _column(means: Means, metric: str, split: str, cutoff: int) -> Column:
    figures = {
        space: _figure(means, row)
        for (name, space, *where), row in means.items()
        if name == metric and where == [split, cutoff]
    }
    reach = figures.pop(RETRAINED_AGAIN, None)
    if not metric.endswith(UNMARKED):
        pairs = {name: (figure.value, figure.error) for name, figure in figures.items()}
        places = compared(pairs, higher=higher_is_better(metric))
        figures = {name: replace(figure, place=places[name].place) for name, figure in figures.items()}
    return Column(metric, split, cutoff, figures, reach)


def higher_is_better(metric: str) -> bool:
    """Return whether a method is the better, the higher its figure is.

    Without the right samples a query's loss rises, and its regeneration is less similar to it; the fewer that takes,
    the better they were named.
    """
    return not any(word in metric for word in ("similarity", "brittleness"))


def _figure(means: Means, row: Mapping[str, Any]) -> Figure:
    where = row["space"], row["split"], row["cutoff"]

    def beside(metric: str) -> float | None:
        other = means.get((metric, *where))
        return None if other is None else float(other["value"])

    low, high = (beside(each) if row["metric"] == LDS else None for each in (LOW, HIGH))
    return Figure(
        row["value"],
        row["standard_error"],
        beside(OVER_MODELS if row["metric"] == LDS else f"{row['metric']}{_OTHER_ERROR}"),
        None if low is None or high is None else (low, high),
        row["queries"],
        beside(WORST_TWIN) if row["metric"] == TWIN_SHARE else None,
        bool(row["metric"] == LATENCY and beside(WHOLE_PASS)),
    )


def _cost_text(metric: str, figure: Figure) -> str:
    """Return a cost as people read it."""
    if metric == STORED:
        return f"{decimal(round(figure.value))}" if figure.value else "nothing"
    if metric == PREPARED:
        return duration(figure.value) if figure.value >= 1 else "under 1 s"
    taken = f"{1000 * figure.value:.3g} ms" if figure.value < 1 else f"{figure.value:.2g} s"
    return f"{taken}, whole pass" if figure.whole_pass else taken


def figures_of(table: JudgeTable) -> Iterator[dict[str, object]]:
    """Yield a row for each figure, with all that is known of it, for a file that programs read."""
    for column in table.columns:
        reached = {REACH: column.reach} if column.reach else {}
        for method, figure in [*column.figures.items(), *reached.items()]:
            low, high = figure.interval or (None, None)
            yield {
                "method": method,
                "judge": column.metric,
                "split": column.split,
                "k": column.cutoff or None,
                "value": figure.value,
                "error_over_queries": figure.over_queries,
                "error_over_models": figure.over_models,
                "low": low,
                "high": high,
                "queries": figure.queries,
                "worst_rank": figure.worst,
                "place": figure.place,
                "whole_pass": figure.whole_pass,
            }
