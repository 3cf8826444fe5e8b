"""What the judges found, for people: a table, a scatter, and the part of the report that shows both."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jinja2
from prefect import task
from prefect.cache_policies import NO_CACHE

from fastgda_core.evaluation.ensembles import BEST
from fastgda_core.extras import installed
from fastgda_core.features import text_space
from storage_schemas.commit import Manifest, commit, input_key, read_manifest
from storage_schemas.runs.rivals import read_rivals
from tasks.artifact import Artifact, Made, once
from tasks.config.pipeline import PipelineConfig
from tasks.judging.judge_table import REACH, Column, JudgeTable, figures_of, judge_table
from tasks.judging.kept_checks import read_checks
from tasks.judging.methods import UNTUNED
from tasks.judging.sketches import SKETCH
from tasks.judging.tiers import HEADS, TWO_STAGES
from tasks.reporting.judged_picture import NO_PICTURE, judged_picture
from tasks.reporting.judged_scatter import judged_scatter
from tasks.teaching.run import Run
from tasks.watching.trust import CAPTIONS, LDS, TEACHER

_TEMPLATES = Path(__file__).with_name("templates")
_MARKS = {"best": "**{}**", "close": "<u>{}</u>", "": "{}"}


def templates() -> jinja2.Environment:
    """Return the pages' templates; a name that is missing is an error."""
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)


def templates_text() -> str:
    """Return the text of all templates: a page is made anew when it changes."""
    return "".join(path.read_text() for path in sorted(_TEMPLATES.glob("*.*")))


@task(task_run_name="judge table", cache_policy=NO_CACHE)
def write_judge_table(run: Run) -> Made:
    """Write the table of a run that was judged by retraining beside its report, in each format of `FORMATS`."""
    # Not keys alone: costs that were measured anew, of the same methods, are other figures.
    found = [(check, read_manifest(check.path)) for check in read_checks(run.workspace, run.name)]
    checks = [(check.name, check.key, manifest.sha256 if manifest else "") for check, manifest in found]
    shown = templates_text(), installed("matplotlib"), run.config.judge, run.config.features.space
    rivals = [(name, record.model_dump()) for name, record in read_rivals(run.workspace, run.name).items()]
    key = input_key("judge table 3", checks, shown, rivals)
    formats = FORMATS | (PICTURES if installed("matplotlib") else {})
    paths = {ending: run.workspace.judge_table(run.name, ending) for ending in formats}

    def make(started: float) -> Manifest:
        table = judge_table(run.workspace, run.name)
        assert table is not None
        rows = sum(len(column.figures) for column in table.columns)
        made = {}
        for ending, render in formats.items():
            write = functools.partial(Path.write_bytes, data=render(table, run))
            made[ending] = commit(paths[ending], write, key=key, rows=rows, started=started)
        return made["html"]

    beside = [path for ending, path in paths.items() if ending != "html"]
    return once(Artifact("judge table", key, paths["html"], 0), paths["html"], make, beside=beside)


def _as_csv(table: JudgeTable, run: Run) -> bytes:
    """Return a line for each figure, with full digits."""
    rows, text = list(figures_of(table)), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _as_markdown(table: JudgeTable, run: Run) -> bytes:
    lines = [f"# Run {run.name}, judged by retraining", "", *meaning(table, run.config)]
    lines += [f"\n**Warning:** {doubt}." for doubt in table.doubts]
    for section in table.sections:
        lines += ["", f"## {section.shared}", "", f"| | {' | '.join(section.heads)} |"]
        lines.append(f"| --- |{' ---: |' * len(section.columns)}")
        rows = [*section.methods, REACH] if any(column.reach for column in section.columns) else section.methods
        lines += [f"| {name} | {' | '.join(_marked(column, name) for column in section.columns)} |" for name in rows]
    text = "\n".join([*lines, "", *(f"- {note}" for note in notes(table, run.config))]) + "\n"
    return text.encode()


def _marked(column: Column, method: str) -> str:
    text = column.text(method)
    return _MARKS[column.place(method)].format(text) if text else ""


def _as_html(table: JudgeTable, run: Run) -> bytes:
    page = templates().get_template("judges.html").render(run=run.name, judged=judged_part(table, run.config))
    return page.encode()


def _picture(table: JudgeTable, form: Literal["svg", "png"]) -> bytes:
    """Return the scatter; nothing of a run without test queries."""
    return judged_scatter(table, form) or b""


FORMATS: dict[str, Callable[[JudgeTable, Run], bytes]] = {"csv": _as_csv, "md": _as_markdown, "html": _as_html}
PICTURES: dict[str, Callable[[JudgeTable, Run], bytes]] = {
    "svg": lambda table, _: _picture(table, "svg"),
    "png": lambda table, _: _picture(table, "png"),
}


def judged_part(table: JudgeTable, config: PipelineConfig) -> dict[str, object]:
    """Return what the template `judged.html` shows."""
    svg = (judged_scatter(table) or b"").decode()
    return {
        "table": table,
        "reach": REACH,
        "picture": judged_picture(table) or NO_PICTURE,
        "scatter": svg[svg.index("<svg") :] if svg else "",
        "meaning": meaning(table, config),
        "notes": notes(table, config),
    }


def meaning(table: JudgeTable, config: PipelineConfig) -> list[str]:
    """Return in two sentences what was measured, and what came out on the test queries."""
    assert config.judge is not None
    judged = table.find(LDS)
    if judged is None:  # no test query
        return []
    figures, share = judged.figures, config.judge.share
    half = "half" if share == 0.5 else f"{100 * share:g} %"
    most = f", and retraining's own chance leaves at most {judged.reach.value:.2f}" if judged.reach else ""
    measured = (
        f"{config.judge.subsets} models were trained again, each on a random {half} of the samples. LDS is the rank "
        "correlation of a method's scores, summed over what a model was trained on, with how well that model knows the "
        f"query: chance is 0{most}."
    )
    of_it = f" ({100 * figures[TEACHER].value / judged.reach.value:.0f} % of that)" if judged.reach else ""
    found = f"On the {figures[TEACHER].queries} test queries the teacher has {figures[TEACHER].value:.2f}{of_it}"
    if CAPTIONS in figures:
        found += f", {CAPTIONS} {figures[CAPTIONS].value:.2f}"
    tiers = [name for name in table.methods if name in (*HEADS.values(), SKETCH) or name.startswith(TWO_STAGES)]
    if tiers:
        kept = ", ".join(f"{figures[name].value:.2f} ({name})" for name in tiers)
        found += f"; what answers in the teacher's place has {kept}"
    return [measured, f"{found}."]


def notes(table: JudgeTable, config: PipelineConfig) -> list[str]:
    """Return what a reader of the table has to know."""
    space, centred = config.features.space, ", centred" if config.features.centre else ""
    named = f'"{UNTUNED}" is {space}{centred}'
    if CAPTIONS in table.methods:
        named += f'; "{CAPTIONS}" is {text_space(space)}{centred}'
    found = [
        "The first error is over queries, the second over models, which queries share; in brackets 95 % of the pools "
        "that a bootstrap draws. The best is bold, and what is within one standard error of it underlined: both errors "
        "together.",
        f"{named}.",
    ]
    if table.machine:
        found.append(
            f"Costs were measured here: {table.machine}. A new query is answered warm, alone, the mean of 20. Where it "
            "says whole pass, the model looks at every sample anew: the mean of 3, and the query's own gradient."
        )
    if any(name.startswith(BEST) for name in table.methods):
        found.append(
            'The sums of standardised scores ("best 2", "best 3") are of the methods with the highest LDS on the '
            "validation queries: their figures on those are of what chose them."
        )
    found += [f"{name} has no scores: {why.splitlines()[0]}" for name, why in table.lacking.items()]
    if HEADS["gradient"] in table.methods:
        found.append(
            "A gradient head is solved from training images as queries: its figures on those are of what it has seen."
        )
    if any(name.startswith(TWO_STAGES) for name in table.methods):
        found.append(
            "Two stages: the newest head's first samples, put in order again by sketches; all others count as 0."
        )
    return found
