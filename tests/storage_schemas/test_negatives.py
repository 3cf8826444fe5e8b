"""A run whose labelling changes between `keep` and `tie`: what is made anew, and what readers see."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage_schemas.audit.lineage import lineage
from storage_schemas.audit.verify import verify
from storage_schemas.publishing.export import export_parquet
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.ledger import read_compaction, read_labelling, write_labelling
from storage_schemas.runs.records import Compaction, Labelling, Part
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.published import Published
from storage_schemas.snapshots.snapshots import read_influence, read_ranks
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import finish_run

RUN, TIE, KEEP = "run-1", Labelling(negatives="tie"), Labelling(negatives="keep")
SCORES = [-1.0, 0.0, 1.0, -1.0]  # of each query, by train_id


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    finish_run(tmp_path, RUN, shift=-1.0)
    return Workspace(tmp_path)


def publish(workspace: Workspace, labelling: Labelling) -> Published:
    write_labelling(workspace, RUN, labelling)
    return publish_runs(workspace, [RUN])


def rows(workspace: Workspace, statement: str) -> list[tuple[object, ...]]:
    found = query(workspace.root, statement)
    return list(zip(*(column.to_pylist() for column in found.columns), strict=True))


def stamps(workspace: Workspace, pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in workspace.root.glob(pattern)}


@pytest.mark.heavy
def test_labels_change_and_come_back_and_no_score_is_made_again(workspace: Workspace) -> None:
    ranks = "SELECT train_id, score, rank, rank_label FROM ranks WHERE query_id = 'q1' ORDER BY score DESC, train_id"
    shards = stamps(workspace, "scores/*/*")
    kept = publish(workspace, KEEP)
    assert not workspace.labelling(RUN).exists(), "as published needs no file"
    before = read_compaction(workspace, RUN)
    assert [row[2:] for row in rows(workspace, ranks)] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    tied = publish(workspace, TIE)
    assert rows(workspace, ranks) == [(2, 1.0, 1, 0.25), (1, 0.0, 4, 1.0), (0, -1.0, 4, 1.0), (3, -1.0, 4, 1.0)]
    assert tied.snapshot != kept.snapshot
    parts = stamps(workspace, "ranks/*/*")
    again = publish(workspace, KEEP)
    assert again.snapshot == kept.snapshot and read_compaction(workspace, RUN) == before
    assert publish(workspace, TIE).snapshot == tied.snapshot
    assert stamps(workspace, "ranks/*/*") == parts and stamps(workspace, "scores/*/*") == shards


@pytest.mark.heavy
def test_labels_change_when_the_shards_are_gone(workspace: Workspace) -> None:
    publish(workspace, TIE)
    assert len(vacuum(workspace, older_than=timedelta(0))) == 3
    publish(workspace, KEEP)
    assert rows(workspace, "SELECT score, rank FROM ranks WHERE query_id = 'q0' ORDER BY rank") == [
        (1.0, 1),
        (0.0, 2),
        (-1.0, 3),
        (-1.0, 4),
    ]


def test_positive_scores_alone_are_another_snapshot_all_the_same(tmp_path: Path) -> None:
    finish_run(tmp_path, RUN, shift=1.0)
    workspace = Workspace(tmp_path)
    kept, tied = publish(workspace, KEEP), publish(workspace, TIE)
    assert kept.snapshot != tied.snapshot
    assert read_ranks(workspace, kept.snapshot).equals(read_ranks(workspace, tied.snapshot))


@pytest.mark.heavy
def test_sums_of_influence_leave_tied_negatives_out_and_scores_stay(workspace: Workspace) -> None:
    sums = "SELECT query_id, sum(influence), sum(score) FROM ranks GROUP BY ALL ORDER BY query_id"
    publish(workspace, KEEP)
    assert rows(workspace, sums) == [(name, -1.0, -1.0) for name in ("q0", "q1", "q2")]
    publish(workspace, TIE)
    assert rows(workspace, sums) == [(name, 1.0, -1.0) for name in ("q0", "q1", "q2")]
    scores = "SELECT DISTINCT score FROM {} WHERE train_id = 0"
    assert rows(workspace, scores.format("scores")) == rows(workspace, scores.format("run_scores")) == [(-1.0,)]


def test_runs_of_both_labellings_stand_in_one_snapshot(workspace: Workspace) -> None:
    finish_run(Path(str(workspace.root)), "kept", queries=("q8",), shift=-1.0)
    write_labelling(workspace, RUN, TIE)
    published = publish_runs(workspace, ["kept", RUN])
    sums = "SELECT query_id, sum(influence), max(rank_label), count(DISTINCT rank) FROM ranks GROUP BY ALL ORDER BY ALL"
    assert rows(workspace, sums) == [(name, 1.0, 1.0, 2) for name in ("q0", "q1", "q2")] + [("q8", -1.0, 1.0, 4)]
    found = read_influence(workspace, published.snapshot, ["q0", "q8"]).sort_by([("query_id", "ascending")])
    by_query = {name: [] for name in ("q0", "q8")}
    for row in found.sort_by("train_id").to_pylist():
        by_query[row["query_id"]].append(row["score"])
    assert by_query == {"q0": list(np.maximum(SCORES, 0)), "q8": SCORES}
    assert read_ranks(workspace, published.snapshot, ["q0"]).sort_by("train_id")["score"].to_pylist() == SCORES
    assert lineage(workspace, published.snapshot).facts["negatives"] == "keep, tie"


def test_damaged_parts_of_both_labellings_are_made_again(workspace: Workspace) -> None:
    publish(workspace, KEEP)
    write_labelling(workspace, RUN, TIE)  # as judging a run does, which leaves what is published alone
    compact(workspace, RUN)
    before = {path: path.read_bytes() for path in Path(str(workspace.root)).glob("ranks/*/*.parquet")}
    assert len(before) == 2
    for path, content in before.items():
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert len(verify(workspace)) == 2
    assert {path: path.read_bytes() for path in before} == before
    compaction = read_compaction(workspace, RUN)
    assert compaction is not None and {part.negatives for part in compaction.parts} == {"tie"}


def test_lineage_tells_the_labelling(workspace: Workspace) -> None:
    tied = publish(workspace, TIE)
    snapshot = lineage(workspace, tied.snapshot)
    assert snapshot.facts["negatives"] == snapshot.made_from[0].facts["negatives"] == "tie"
    kept = publish(workspace, KEEP)
    assert lineage(workspace, kept.snapshot).facts["negatives"] == lineage(workspace, RUN).facts["negatives"] == "keep"


def test_an_export_has_the_ranks_of_the_labelling(workspace: Workspace, tmp_path: Path) -> None:
    write_labelling(workspace, RUN, TIE)
    export_parquet(workspace, RUN, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["rank"].to_pylist() == [1, 4, 4, 4] * 3


def test_what_earlier_releases_wrote_is_labelled_as_published(workspace: Workspace) -> None:
    parts = compact(workspace, RUN)
    old = [{name: value for name, value in part.model_dump().items() if name != "negatives"} for part in parts]
    workspace.compaction(RUN).write_text(json.dumps({"parts": old}))
    assert read_compaction(workspace, RUN) == Compaction(parts=parts)
    assert all(isinstance(part, Part) and part.negatives == "keep" for part in parts)
    assert read_labelling(workspace, RUN) == KEEP
