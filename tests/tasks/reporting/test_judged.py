"""What the judges found, as files and as a part of the report."""

from __future__ import annotations

import csv
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from storage_schemas import tables
from storage_schemas.commit import commit_table
from tasks.judging.costs import COSTS, LATENCY
from tasks.judging.judge_table import judge_table
from tasks.judging.kept_checks import read_checks
from tasks.judging.tiers import HEADS
from tasks.reporting import announcements, judged, judged_picture, judged_scatter
from tasks.reporting.judged import FORMATS, judged_part, meaning, notes, write_judge_table
from tasks.reporting.report import write_report
from tasks.watching.trust import LDS, TEACHER
from tests.tasks.reporting.test_report import stages
from tests.tasks.whole_runs import WholeRun


def test_the_table_lies_beside_the_report_in_three_formats(unlearned: WholeRun) -> None:
    made = write_judge_table.fn(unlearned.run)
    assert made.reused, "judging wrote it"
    paths = {ending: unlearned.workspace.judge_table(unlearned.run.name, ending) for ending in FORMATS}
    assert made.artifact.path == paths["html"] and {path.parent for path in paths.values()} == {
        unlearned.workspace.report(unlearned.run.name).parent
    }
    with paths["csv"].open() as file:
        rows = [each for each in csv.DictReader(file) if (each["judge"], each["split"]) == (LDS, "test")]
    metrics = tables.read(unlearned.evaluation.metrics.artifact.path, tables.METRICS).to_pylist()
    figures = {
        row["space"]: row for row in metrics if (row["metric"], row["split"], row["query_id"]) == (LDS, "test", "")
    }
    assert len(rows) == len(figures)
    for row in rows[:-1]:  # the last one is what a score can reach
        assert float(row["value"]) == figures[row["method"]]["value"]
        assert float(row["error_over_queries"]) == figures[row["method"]]["standard_error"]
    lines = paths["md"].read_text().splitlines()
    assert sum(line.startswith(f"| {TEACHER} |") for line in lines) == 5 and any("| **" in line for line in lines)
    page = paths["html"].read_text()
    assert page.count("<svg") == 2 and 'class="best"' in page and "Without training" in page
    for method in (HEADS["symmetric"], "two stages, first 4", "pixel"):
        assert f"<td>{method}</td>" in page and any(line.startswith(f"| {method} |") for line in lines)


def test_the_table_is_written_anew_when_costs_alone_are_measured_again(unlearned: WholeRun, tmp_path: Path) -> None:
    folder = tmp_path / "workspace"
    shutil.copytree(unlearned.workspace.root, folder)
    config = unlearned.config.model_copy(update={"workspace": str(folder)})
    run = replace(unlearned.run, context=replace(unlearned.context, config=config))
    assert write_judge_table.fn(run).reused
    costs = next(check for check in read_checks(run.workspace, run.name) if check.name == COSTS)
    rows = tables.read(costs.path, tables.METRICS).to_pylist()
    dearer = [row | {"value": 77.0 if row["metric"] == LATENCY else row["value"]} for row in rows]
    costs.path.unlink()
    table = pa.Table.from_pylist(dearer, schema=tables.METRICS.schema)
    commit_table(costs.path, table, tables.METRICS, key=costs.key, started=time.monotonic())
    made = write_judge_table.fn(run)
    assert not made.reused and "77 s" in made.artifact.path.read_text()
    assert write_judge_table.fn(run).reused


def test_the_report_shows_it_where_models_were_trained_again(unlearned: WholeRun, similar: WholeRun) -> None:
    pages = [
        write_report.fn(run.context, run.run.name, stages(run)).artifact.path.read_text()
        for run in (unlearned, similar)
    ]
    assert ["<h2>Judged by retraining</h2>" in page for page in pages] == [True, False]


def test_the_table_is_shown_in_prefect(unlearned: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    monkeypatch.setattr(announcements, "publish_markdown", lambda key, text, _: told.update({key: text}))
    announcements.announce_judges(unlearned.run)
    assert f"| {TEACHER} |" in told[f"judges {unlearned.run.name}"]


def test_two_sentences_say_what_was_measured_and_what_came_out(unlearned: WholeRun) -> None:
    table = judge_table(unlearned.workspace, unlearned.run.name)
    assert table is not None
    column = table.find(LDS)
    assert column is not None and column.reach is not None
    measured, found = meaning(table, unlearned.config)
    assert measured.startswith("4 models were trained again, each on a random half of the samples.")
    assert f"at most {column.reach.value:.2f}" in measured
    value = column.figures[TEACHER].value
    assert found.startswith(f"On the 2 test queries the teacher has {value:.2f} (")
    assert f"{column.figures['sketch'].value:.2f} (sketch)" in found
    assert not any("gradient head" in note for note in notes(table, unlearned.config))


def test_without_matplotlib_a_line_says_what_is_missing(unlearned: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    table = judge_table(unlearned.workspace, unlearned.run.name)
    assert table is not None
    for module in (judged_picture, judged_scatter):
        monkeypatch.setattr(module, "installed", lambda _: False)
    part = judged_part(table, unlearned.config)
    assert part["picture"] == judged_picture.NO_PICTURE
    page = judged.templates().get_template("judges.html").render(run="r", judged=part)
    assert "pip install" in page and "<svg" not in page
