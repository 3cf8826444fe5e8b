"""Take-downs: every reader honours one at once, nothing on disk is lost, and a wrong one is lifted by a record."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage_schemas import tables
from storage_schemas.audit.facts import sample_node
from storage_schemas.audit.verify import take_downs_fault, verify
from storage_schemas.errors import StoreError
from storage_schemas.indexed_samples import write_indexed
from storage_schemas.publishing.export import export_datasets, export_parquet
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.publishing.release import export_release
from storage_schemas.publishing.takedown import CannotLift, NoSuchSample, lift, plan_take_down, take_down
from storage_schemas.runs.ledger import read_run
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.sql.views import query
from storage_schemas.table import DamagedTable
from storage_schemas.tombstones import UnreadableTombstones, read_tombstones, removed_ids
from storage_schemas.workspace import Workspace, twins_beside
from tests.storage_schemas.workspaces import (
    commit_index,
    finish_run,
    plan_run,
    publish_run,
    write_table,
)

SAID = {"reason": "the artist asked for it", "by": "Ada"}
HOSTILE = "x'); DROP VIEW samples; -- \" }], [\\u0000"


def renumber(workspace: Workspace, samples: str | None, first: int) -> None:
    """Make sample 0 of a table the image that has the number `first` in others, and so on."""
    path = workspace.file(samples or "")
    rows = tables.read(path, tables.SAMPLES).to_pylist()
    rows = [row | {"image_sha256": f"{row['train_id'] + first:064x}"} for row in rows]
    write_table(path, tables.SAMPLES, rows, path.parent.name)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Three queries, four samples."""
    publish_run(tmp_path / "w", extras=True)
    return Workspace(tmp_path / "w")


def ids(workspace: Workspace, view: str) -> set[int]:
    return set(query(workspace.root, f"SELECT DISTINCT train_id FROM {view}")["train_id"].to_pylist())


@pytest.mark.heavy
def test_no_view_names_a_removed_sample_and_all_do_again_when_it_is_lifted(workspace: Workspace) -> None:
    record = read_run(workspace, "run-1")
    twins = [{"query_id": f"q{number}", "train_id": number} for number in range(2)]
    write_table(twins_beside(workspace.queries("run-1")), tables.TWINS, twins)
    path = workspace.queries("run-1")
    queries = tables.read(path, tables.QUERIES).to_pylist()
    queries[0]["split"] = tables.PSEUDO  # it is the image of sample 0 itself
    write_table(path, tables.QUERIES, queries, "another key")
    views = {"samples", "scores", "ranks", "run_scores", "candidates", "twins", "exact_check", "base_losses"}
    before = {view: ids(workspace, view) for view in views}
    files = {each: each.read_bytes() for each in Path(str(workspace.root)).rglob("*.parquet")}
    done = take_down(workspace, [0], **SAID)
    assert {view: ids(workspace, view) for view in views} == {view: found - {0} for view, found in before.items()}
    assert query(workspace.root, "SELECT query_id FROM queries")["query_id"].to_pylist() == ["q1", "q2"]
    with duckdb.connect(str(workspace.catalog), read_only=True) as catalog:
        assert catalog.execute("SELECT DISTINCT train_id FROM ranks ORDER BY ALL").fetchall() == [(1,), (2,), (3,)]
    # Ranks of the others stay, as they are the teacher's among all that it scored.
    ranks = query(workspace.root, "SELECT rank FROM ranks WHERE query_id = 'q1' ORDER BY rank")["rank"].to_pylist()
    assert ranks == [1, 2, 4]
    assert {each: each.read_bytes() for each in files} == files and verify(workspace) == []
    assert (done.record.number, done.record.runs, done.record.published) == (1, ["run-1"], 2)
    assert record.samples in {each.samples for each in done.record.removed}
    lift(workspace, 1, reason="the artist agreed", by="Grace")
    assert {view: ids(workspace, view) for view in views} == before


@pytest.mark.heavy
def test_the_record_is_a_table_with_what_held_the_image(workspace: Workspace) -> None:
    published = read_published(workspace)
    commit_index(workspace, "i", published.samples or "", head="h")
    report = Path(str(workspace.report("run-1")))
    report.parent.mkdir(parents=True)
    report.write_text("a page")
    take_down(workspace, [2, 3], reason=HOSTILE, by=HOSTILE)
    (row, other) = query(workspace.root, "SELECT * FROM tombstones ORDER BY train_id").to_pylist()
    assert (row["train_id"], other["train_id"], row["number"], row["in_force"]) == (2, 3, 1, True)
    assert (row["reason"], row["removed_by"]) == (HOSTILE, HOSTILE)
    held = {name: row[name] for name in ("indexes", "heads", "runs", "snapshots", "reports")}
    assert held == {
        "indexes": ["i"],
        "heads": ["h"],
        "runs": ["run-1"],
        "snapshots": [published.snapshot],
        "reports": ["reports/run-1/report.html"],
    }
    for view in ("heads", "indexes", "runs"):
        assert query(workspace.root, f"SELECT stale FROM {view}")["stale"].to_pylist() == [True]
    commit_index(workspace, "j", published.samples or "", head="h", train_ids=[0, 1])
    stale = dict(
        zip(*query(workspace.root, "SELECT index_version, stale FROM indexes").to_pydict().values(), strict=True)
    )
    assert stale == {"i": True, "j": False}
    lift(workspace, 1, reason=HOSTILE, by="Grace")
    (row, _) = query(workspace.root, "SELECT * FROM tombstones ORDER BY train_id").to_pylist()
    assert (row["in_force"], row["lifted_by"], row["lifted_reason"]) == (False, "Grace", HOSTILE)
    assert query(workspace.root, "SELECT stale FROM heads")["stale"].to_pylist() == [False]


@pytest.mark.heavy
def test_the_same_bytes_are_removed_in_data_that_is_ingested_later(workspace: Workspace, tmp_path: Path) -> None:
    take_down(workspace, [3], **SAID)
    later = plan_run(tmp_path / "w", "later", samples=6)
    renumber(workspace, later.samples, 1)  # what was 3 is 2 there
    assert removed_ids(workspace, later.samples).tolist() == [2]
    assert removed_ids(workspace, workspace.file(later.samples or "")).tolist() == [2]
    finish_run(tmp_path / "w", "later", samples=6)
    renumber(workspace, later.samples, 1)
    publish_runs(workspace, ["later"])
    assert ids(workspace, "ranks") == {0, 1, 3, 4, 5}
    done = take_down(workspace, [0], **SAID)  # the image with the number 1 in the data before
    assert {(each.samples, each.train_id) for each in done.record.removed} == {
        (later.samples, 0),
        (read_run(workspace, "run-1").samples, 1),
    }
    run_scores = query(workspace.root, "SELECT run, train_id FROM run_scores").to_pylist()
    assert {row["train_id"] for row in run_scores if row["run"] == "run-1"} == {0, 2}
    assert {row["train_id"] for row in run_scores if row["run"] == "later"} == {1, 3, 4, 5}


def test_a_second_take_down_and_a_second_lifting_change_nothing(workspace: Workspace) -> None:
    take_down(workspace, [1], **SAID)
    again = take_down(workspace, [1, 1], **SAID)
    assert (again.asked, again.already) == ([], {1: 1}) and read_tombstones(workspace).number == 1
    both = take_down(workspace, [1, 2], **SAID)
    assert ([each.train_id for each in both.asked], both.already, both.record.number) == ([2], {1: 1}, 2)
    assert lift(workspace, 1, **SAID).number == 3
    with pytest.raises(CannotLift, match="take-down 1 is lifted already, by record 3"):
        lift(workspace, 1, **SAID)
    for number in (0, 3, 9):
        with pytest.raises(CannotLift, match=f"no take-down {number} to lift; in force: 2"):
            lift(workspace, number, **SAID)
    assert take_down(workspace, [1], **SAID).record.number == 4
    assert removed_ids(workspace, read_published(workspace).samples).tolist() == [1, 2]


def test_what_cannot_be_taken_down_is_refused_and_nothing_is_written(workspace: Workspace, tmp_path: Path) -> None:
    for train_ids in ([4], [0, -1], [10**30]):
        with pytest.raises(NoSuchSample, match="there is no train_id"):
            take_down(workspace, train_ids, **SAID)
    for reason, by in ((" ", "x"), ("x", "\n"), ("x" * 3000, "x"), ("x\ud800", "x")):
        with pytest.raises(StoreError):
            take_down(workspace, [1], reason=reason, by=by)
    assert plan_take_down(workspace, [1], **SAID).record.removed
    assert not workspace.tombstones.exists()
    empty = Workspace(tmp_path / "empty")
    with pytest.raises(NotPublished):
        take_down(empty, [0], **SAID)
    record = plan_run(tmp_path / "empty")  # before anything is published: what was indexed last
    write_indexed(empty, empty.file(record.samples or ""), empty.file(record.rejected_samples or ""))
    take_down(empty, [0], **SAID)
    assert ids(empty, "samples") == {1, 2, 3}


@pytest.mark.parametrize("harm", ["altered", "gone", "cut", "a later layout"])
def test_a_record_that_was_altered_or_lost_is_noticed_and_nothing_is_shown(workspace: Workspace, harm: str) -> None:
    for train_id in (1, 2):
        take_down(workspace, [train_id], **SAID)
    first = Path(str(workspace.tombstone(1)))
    content = first.read_text()
    if harm == "gone":
        first.unlink()
    elif harm == "altered":
        first.write_text(content.replace("Ada", "Bob"))
    elif harm == "cut":
        first.write_text(content[:100])
    else:
        first.write_text(content.replace('"layout_version": "1"', '"layout_version": "2"'))
    for use in (lambda: read_tombstones(workspace), lambda: query(workspace.root, "FROM samples")):
        with pytest.raises(UnreadableTombstones, match="put the records of take-downs back"):
            use()
    assert "tombstones/0000" in take_downs_fault(workspace)
    first.write_text(content)
    assert take_downs_fault(workspace) == "" and read_tombstones(workspace).number == 2


def test_what_was_read_before_is_not_read_again(workspace: Workspace) -> None:
    take_down(workspace, [1], **SAID)
    known = read_tombstones(workspace)
    assert read_tombstones(workspace, known).records == known.records
    Path(str(workspace.tombstone(1))).rename(workspace.tombstones / "elsewhere")
    assert read_tombstones(workspace, known).images == known.images
    (workspace.tombstones / "elsewhere").rename(workspace.tombstone(1))
    take_down(workspace, [2], **SAID)
    now = read_tombstones(workspace, known)
    assert now.number == 2 and now.images == read_tombstones(workspace).images


@pytest.mark.heavy
def test_exports_leave_removed_samples_out(workspace: Workspace, tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    export_parquet(workspace, "run-1", whole)
    take_down(workspace, [2], **SAID)
    for name, export in (("p.parquet", export_parquet), ("d", export_datasets), ("r.pkl", export_release)):
        export(workspace, "run-1", tmp_path / name)
    expected = pq.read_table(whole).to_pylist()
    left = [row for row in expected if row["train_id"] != 2]
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == left
    (data,) = (tmp_path / "d" / "data").glob("*.parquet")
    assert pa.Table.to_pylist(pq.read_table(data).drop_columns(["caption"])) == left
    card = (tmp_path / "d" / "README.md").read_text()
    assert f"num_examples: {len(left)}" in card and f"{len(left)} rows of 3 queries" in card
    release = pickle.loads((tmp_path / "r.pkl").read_bytes())["random"]
    assert release["rank"].shape == (3, 3)
    assert set(release["rank"].ravel().tolist()) == {0, 1, 3}
    named = json.loads((tmp_path / "r.rows.json").read_text())["query_ids"]
    for row, query_id in enumerate(named):
        scored = {each["train_id"]: each["score"] for each in left if each["query_id"] == query_id}
        assert release["rank"][row].tolist() == sorted(scored, key=lambda each: (-scored[each], each))


def test_a_table_that_is_gone_is_named_in_one_line(workspace: Workspace) -> None:
    take_down(workspace, [1], **SAID)
    samples = read_published(workspace).samples or ""
    (part, *_) = Path(str(workspace.root)).glob("ranks/*/part-*.parquet")
    for path in (part, workspace.file(samples)):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DamagedTable, match=f"{path.name} is gone.*`fastgda verify`") as refused:
            query(workspace.root, "SELECT * FROM ranks")
        assert "\n" not in str(refused.value)
        path.write_bytes(content)
    workspace.file(samples).unlink()
    held, down = (sample_node(workspace, samples, train_id) for train_id in (0, 1))
    assert held.facts == {samples: "missing"}
    assert SAID["reason"] in down.facts["taken_down_1"] and "key" not in down.facts
