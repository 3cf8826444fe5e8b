"""The report and what is announced of a run, from a tiny one."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from typing import Any

import pytest
from PIL import Image

from storage_schemas import tables
from storage_schemas.snapshots.snapshots import read_ranks
from tasks.artifact import Made
from tasks.distilling.labels import read_labels
from tasks.inputs.queries import load_queries
from tasks.reporting import announcements
from tasks.reporting.announcements import (
    announce_head,
    announce_index,
    announce_metrics,
    announce_scores,
    announce_trust,
)
from tasks.reporting.attribution_sheet import GAP, LABEL, TILE, attribution_sheet, spread
from tasks.reporting.report import write_report
from tasks.watching import events
from tests.tasks.whole_runs import CUTOFFS, WholeRun


def stages(run: WholeRun) -> list[Made]:
    return [*run.curation.made, run.head, run.index, *run.checks, run.evaluation.metrics]


@pytest.mark.heavy
def test_a_report_shows_the_figures_and_the_pictures_of_the_test_queries(unlearned: WholeRun) -> None:
    made = write_report.fn(unlearned.context, unlearned.run.name, stages(unlearned))
    page = made.artifact.path.read_text()
    assert made.artifact.path == unlearned.workspace.report(unlearned.run.name)
    assert 'src="http' not in page and "<link" not in page, "self-contained"
    rows = tables.read(unlearned.evaluation.metrics.artifact.path, tables.METRICS).to_pylist()
    means = {(row["metric"], row["space"], row["cutoff"]): row["value"] for row in rows if not row["query_id"]}
    for space in ("tuned", "untuned", "sketch", "chance"):
        assert f"{means['mAP', space, CUTOFFS[0]]:.3f}" in page
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 2 * (1 + 4 * 3), "each test query, and three samples by each of four rankings"
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).format == "PNG"
    queries = load_queries(unlearned.run.artifacts["queries"])
    panels = [query.query_id for query in queries if f">{query.query_id}<br>AP(" in page]
    assert panels == [query.query_id for query in queries if query.split == "test"]
    assert write_report.fn(unlearned.context, unlearned.run.name, stages(unlearned)).reused


def test_a_report_says_how_much_the_index_finds(unlearned: WholeRun) -> None:
    page = write_report.fn(unlearned.context, unlearned.run.name, stages(unlearned)).artifact.path.read_text()
    told = json.loads((unlearned.index.artifact.path / "index.json").read_text())
    part = page.split("<h2>How much of exact search the index finds</h2>")[1].split("<h2>")[0]
    cells = re.findall(r"<td>(.*?)</td>", part)
    recalls = [f"{told[f'recall_at_{depth}']:.4f}" for depth in (10, 100)]
    assert cells == [unlearned.index.artifact.key, told["kind"], str(told["rows"]), *recalls]
    assert told["reason"] in html.unescape(part) and "fastgda index list" in part
    assert f"measured on {told['recall_queries']:,} vectors: {told['recall_of']}" in html.unescape(part)


def test_a_report_says_what_the_teacher_compares(similar: WholeRun, unlearned: WholeRun) -> None:
    pages = [
        write_report.fn(run.context, run.run.name, stages(run)).artifact.path.read_text()
        for run in (similar, unlearned)
    ]
    assert ["compares gradients of the loss" in page for page in pages] == [False, True]
    assert [f"features in {similar.config.features.space}, by their cosine" in page for page in pages] == [True, False]


def test_a_sheet_has_a_row_for_each_query_with_its_first_samples(similar: WholeRun) -> None:
    run = similar.run
    samples, queries = run.artifacts["samples"], run.artifacts["queries"]
    sheet = Image.open(
        io.BytesIO(attribution_sheet(similar.workspace, similar.curation.ranks.key, samples, queries, 3, 2))
    )
    assert sheet.size == (3 * (TILE + GAP) + 2 * GAP, 3 * (TILE + LABEL + GAP) + GAP)

    def tile(column: int) -> bytes:
        left = GAP + column * (TILE + GAP) + (GAP if column else 0)
        box = (left + 8, GAP + LABEL + 8, left + TILE - 8, GAP + LABEL + TILE - 8)
        return sheet.crop(box).convert("L").resize((8, 8)).tobytes()

    query, first, second = (tile(column) for column in range(3))
    assert max(abs(a - b) for a, b in zip(query, first, strict=True)) < 16, "this query is a sample, which comes first"
    assert max(abs(a - b) for a, b in zip(query, second, strict=True)) > 16


@pytest.mark.parametrize(("items", "shown", "expected"), [(3, 5, [0, 1, 2]), (10, 3, [0, 3, 6]), (0, 2, [])])
def test_what_is_shown_is_spread_over_all(items: int, shown: int, expected: list[int]) -> None:
    assert spread(items, shown) == expected


def test_everybody_who_waits_hears_what_is_there(similar: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to Prefect: kept here, as there is no server."""
    told: dict[str, str] = {}
    pictures: dict[str, bytes] = {}
    emitted: list[dict[str, Any]] = []
    monkeypatch.setattr(announcements, "publish_markdown", lambda key, text, _: told.update({key: text}))
    monkeypatch.setattr(announcements, "publish_image", lambda key, picture, _: pictures.update({key: picture}))
    for name in ("get_id", "get_name"):
        monkeypatch.setattr(events.flow_run, name, lambda: "here")
    monkeypatch.setattr(events, "emit_event", lambda **event: emitted.append(event))
    context, run, labels = similar.context, similar.run.name, read_labels(similar.workspace, None)
    head, index, ranks = similar.head.artifact, similar.index.artifact, similar.curation.ranks
    announce_scores(similar.run, ranks.key)
    announce_trust(similar.run)
    announce_head(context, head, labels)
    announce_index(context, index, head)
    announce_metrics(context, similar.evaluation, head, labels)

    assert [event["event"] for event in emitted] == [
        events.SCORES_PUBLISHED, events.HEAD_TRAINED, events.INDEX_BUILT, events.INDEX_PROMOTED,
    ]  # fmt: skip
    assert [event["payload"] for event in emitted][1:3] == [
        {"head": head.key, "workspace": similar.config.workspace, "snapshot": ranks.key},
        {"index": index.key, "workspace": similar.config.workspace, "head": head.key},
    ]
    count = read_ranks(similar.workspace, ranks.key, None).num_rows
    assert f"runs `{run}`, {count:,} rows" in told[f"published {ranks.key}"]
    assert "twins found" in told[f"teacher {run}"]
    assert f"`fastgda lineage {index.key} --workspace" in told[f"index {index.key}"]
    history = told[f"map history {similar.config.name}"]
    assert "promoted" in history and f"{similar.evaluation.tuned:.3f} | 1.000 | 2" in history
    assert pictures[f"top attributions {run}"].startswith(b"\xff\xd8")
    assert pictures[f"loss {head.key}"].startswith(b"\x89PNG")
