from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from storage_schemas import tables
from storage_schemas.errors import StoreError
from storage_schemas.publishing.publish import publish_runs, retract_run, update_published
from storage_schemas.runs.ledger import published_versions, read_compaction
from storage_schemas.runs.records import UnknownRun
from storage_schemas.snapshots.compaction import RunUnfinished
from storage_schemas.snapshots.published import CannotPublish, NotPublished, Published, read_published
from storage_schemas.snapshots.snapshots import read_ranks, read_snapshot
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import commit_shard, finish_run, plan_run, publish_run, show


def scores(root: Path, source: str = "scores") -> dict[str, list[float]]:
    """Scores of each query by train_id."""
    rows = query(root, f"SELECT query_id, list(score ORDER BY train_id) AS s FROM {source} GROUP BY query_id")
    return dict(zip(rows["query_id"].to_pylist(), rows["s"].to_pylist(), strict=True))


OLD, NEW = [0.0, 1.0, 2.0, 0.0], [100.0, 101.0, 102.0, 100.0]


@pytest.mark.heavy
def test_a_later_run_adds_queries_and_replaces_those_that_it_scored_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, "first", queries=("q0", "q1", "q2"))
    finish_run(tmp_path, "second", queries=("q1", "q9"), shift=100.0)
    assert scores(tmp_path) == {"q0": OLD, "q1": OLD, "q2": OLD}
    published = publish_runs(workspace, ["first", "second"])
    assert scores(tmp_path) == {"q0": OLD, "q1": NEW, "q2": OLD, "q9": NEW}
    snapshot = read_snapshot(workspace, published.snapshot)
    assert (snapshot.runs, snapshot.rows, snapshot.queries) == (["first", "second"], 16, 4)
    ranked = query(
        tmp_path, "SELECT query_id, max(rank) AS r, max(rank_label) AS l FROM ranks GROUP BY ALL"
    ).to_pylist()
    assert all((row["r"], row["l"]) == (4, 1.0) for row in ranked) and len(ranked) == 4
    assert scores(tmp_path, "run_scores WHERE run = 'first'") == {"q0": OLD, "q1": OLD, "q2": OLD}
    assert {row["query_id"] for row in query(tmp_path, "SELECT query_id FROM queries").to_pylist()} == {
        "q0",
        "q1",
        "q2",
        "q9",
    }


@pytest.mark.heavy
def test_a_retracted_runs_rows_go_and_those_that_it_replaced_come_back(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    before = publish_run(tmp_path, "first", queries=("q0", "q1"))
    finish_run(tmp_path, "second", queries=("q1", "q9"), shift=100.0)
    publish_runs(workspace, ["first", "second"])
    left = retract_run(workspace, "second")
    assert left is not None and left.snapshot == before.snapshot
    assert scores(tmp_path) == {"q0": OLD, "q1": OLD}
    with pytest.raises(NotPublished, match="run second is not published; the published snapshot holds: first"):
        retract_run(workspace, "second")
    assert retract_run(workspace, "first") is None
    with pytest.raises(NotPublished):
        read_published(workspace)
    assert scores(tmp_path) == {}
    assert scores(tmp_path, "run_scores WHERE run = 'second'") == {"q1": NEW, "q9": NEW}


@pytest.mark.heavy
def test_a_part_without_replaced_queries_can_be_made_when_the_shards_are_gone(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, "first", queries=("q0", "q1", "q2"))
    assert len(vacuum(workspace, older_than=timedelta(0))) == 3
    assert scores(tmp_path) == {"q0": OLD, "q1": OLD, "q2": OLD}
    finish_run(tmp_path, "second", queries=("q1",), shift=100.0)
    publish_runs(workspace, ["first", "second"])
    assert scores(tmp_path) == {"q0": OLD, "q1": NEW, "q2": OLD}


@pytest.mark.heavy
def test_publishing_the_same_rows_again_changes_nothing_and_keeps_what_stands_on_them(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path)
    served = show(workspace, head="heads/h", index="indexes/i")
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("ranks/*/*")}
    assert publish_runs(workspace, ["run-1"]) == served
    assert parts == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("ranks/*/*")}


@pytest.mark.heavy
@pytest.mark.parametrize(("samples", "served"), [(4, "heads/h"), (5, None)])
def test_a_head_is_served_over_new_rows_until_a_train_id_may_mean_another_image(
    tmp_path: Path, samples: int, served: str | None
) -> None:
    workspace = Workspace(tmp_path)
    first = publish_run(tmp_path, "first")
    show(workspace, head="heads/h", index="indexes/i")
    finish_run(tmp_path, "second", queries=("q9",), samples=samples)
    published = publish_runs(workspace, ["first", "second"] if served else ["second"])
    assert published.snapshot != first.snapshot
    assert published.head == served and (published.index is None) == (served is None)


@pytest.mark.heavy
def test_a_snapshots_name_and_rows_never_change(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = publish_run(tmp_path, "first")
    rows = read_ranks(workspace, first.snapshot)
    finish_run(tmp_path, "second", queries=("q0",), shift=100.0)
    second = publish_runs(workspace, ["first", "second"])
    assert second.snapshot != first.snapshot
    assert read_ranks(workspace, first.snapshot).equals(rows)
    assert read_ranks(workspace, first.snapshot, ["q2", "no such query"])["query_id"].to_pylist() == ["q2"] * 4
    compaction = read_compaction(workspace, "first")
    assert compaction is not None and compaction.parts == read_snapshot(workspace, first.snapshot).parts


def test_an_unfinished_run_is_not_published(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = publish_run(tmp_path, "first")
    plan_run(tmp_path, "second")
    commit_shard(tmp_path, "second", 1, "q1")
    with pytest.raises(
        RunUnfinished, match=r"run second: 2 of 3 score shards are not done \(first: 0\).*fastgda retry"
    ):
        publish_runs(workspace, ["second"])
    assert read_published(workspace) == first


def test_runs_over_different_data_do_not_stand_in_one_snapshot(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, "first")
    finish_run(tmp_path, "second", queries=("q9",), samples=5)
    with pytest.raises(CannotPublish, match="a train_id would mean two images"):
        publish_runs(workspace, ["first", "second"])


def test_one_query_id_does_not_mean_two_images(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, "first")
    record = finish_run(tmp_path, "second", queries=("q0",))
    assert record.queries is not None
    path = workspace.file(record.queries)
    rows = tables.read(path, tables.QUERIES).to_pylist()
    table = tables.QUERIES.rows(**{name: [row[name] for row in rows] for name in tables.QUERIES.schema.names})
    other = table.set_column(4, tables.QUERIES.schema.field(4), [["1" * 64]])
    path.write_bytes(tables.QUERIES.encode(other, {}))
    with pytest.raises(CannotPublish, match="query 'q0' of run second has another image"):
        publish_runs(workspace, ["first", "second"])


def test_an_unknown_run_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    publish_run(tmp_path, "first")
    with pytest.raises(UnknownRun, match="has no run other; it has: first"):
        publish_runs(Workspace(tmp_path), ["other"])


@pytest.mark.parametrize("content", [b"", b"{}", b'{"run": "r", "teacher": "t"}', b"\xff"])
def test_what_another_release_published_is_refused_with_the_mend(tmp_path: Path, content: bytes) -> None:
    publish_run(tmp_path)
    (tmp_path / "current.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"another release: run `fastgda run CONFIG` again"):
        query(tmp_path, "SELECT 1")
    assert update_published(Workspace(tmp_path), lambda before: before) is None
    assert (tmp_path / "current.json").read_bytes() == content


@pytest.mark.heavy
def test_a_workspace_that_an_earlier_release_published_goes_on(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    published = publish_run(tmp_path, "first")
    document = published.model_dump(mode="json", exclude={"version"})
    workspace.current.write_text(json.dumps(document))
    shutil.rmtree(tmp_path / "published")
    assert read_published(workspace) == published.model_copy(update={"version": 0})
    finish_run(tmp_path, "second", queries=("q9",))
    assert publish_runs(workspace, ["second"], add=True).version == 2  # the first is what was there
    assert read_snapshot(workspace, read_published(workspace).snapshot).runs == ["first", "second"]
    # Somebody goes back to that release for a while: what it publishes is what readers see, and it goes on from there.
    workspace.current.write_text(json.dumps(document | {"index": "indexes/i"}))
    assert read_published(workspace).index == "indexes/i"
    now = publish_runs(workspace, ["second"], add=True)
    assert (now.version, now.index) == (4, "indexes/i")


@pytest.mark.heavy
@pytest.mark.parametrize("kept", ["first", "nothing"])
def test_what_a_writer_that_died_had_published_is_what_readers_see_and_the_next_writer_completes_it(
    tmp_path: Path, kept: str
) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, "first")
    if kept == "first":
        finish_run(tmp_path, "second", queries=("q9",))
        before = workspace.current.read_bytes()
        publish_runs(workspace, ["second"], add=True)
        workspace.current.write_bytes(before)  # it died between the version and the pointer
    else:
        workspace.current.unlink()
    assert scores(tmp_path).keys() == ({"q0", "q1", "q2", "q9"} if kept == "first" else {"q0", "q1", "q2"})
    now = read_published(workspace)
    assert publish_runs(workspace, read_snapshot(workspace, now.snapshot).runs) == now
    assert workspace.current.read_bytes() == workspace.published(now.version).read_bytes()


@pytest.mark.heavy
def test_a_retraction_of_the_last_run_whose_writer_died_is_not_undone(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, "first")
    before = workspace.current.read_bytes()
    retract_run(workspace, "first")
    workspace.current.write_bytes(before)
    with pytest.raises(NotPublished, match="no published run"):
        read_published(workspace)
    assert scores(tmp_path) == {}
    assert publish_runs(workspace, ["first"]).version == 3


@pytest.mark.heavy
def test_a_promotion_that_began_before_a_publication_keeps_it(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, "first")
    finish_run(tmp_path, "second", queries=("q9",))
    asked: list[str] = []

    def promote(before: Published | None) -> Published | None:
        assert before is not None
        asked.append(before.run)
        if len(asked) == 1:
            publish_runs(workspace, ["second"], add=True)
        return before.model_copy(update={"index": "indexes/i"})

    update_published(workspace, promote)
    now = read_published(workspace)
    assert (asked, now.run, now.index) == (["first", "second"], "second", "indexes/i")


@pytest.mark.heavy
def test_a_writer_that_slept_while_its_number_was_vacuumed_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path)
    monkeypatch.setattr("storage_schemas.snapshots.vacuum.VERSIONS_KEPT", 2)
    slept: list[str] = []

    def promote(before: Published | None) -> Published | None:
        if not slept:
            for number in range(5):
                slept.append(f"indexes/{number}")
                show(workspace, index=slept[-1])
            gone = [path.name for path in vacuum(workspace, older_than=timedelta(0))]
            assert gone[:4] == ["00001.json", "00002.json", "00003.json", "00004.json"]
        return before and before.model_copy(update={"head": "heads/h"})

    now = update_published(workspace, promote)
    assert now is not None and (now.version, now.head, now.index) == (7, "heads/h", "indexes/4")
    assert published_versions(workspace) == [5, 6, 7]


@pytest.mark.heavy
def test_a_pointer_to_a_version_that_is_vacuumed_misleads_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path)
    monkeypatch.setattr("storage_schemas.snapshots.vacuum.VERSIONS_KEPT", 2)
    pointed = workspace.current.read_bytes()
    for number in range(5):
        show(workspace, index=f"indexes/{number}")
    vacuum(workspace, older_than=timedelta(0))
    assert published_versions(workspace) == [5, 6]
    workspace.current.write_bytes(pointed)  # by a writer that slept, and died before it looked again
    assert (read_published(workspace).version, read_published(workspace).index) == (6, "indexes/4")
    now = show(workspace, head="heads/h")
    assert (now.version, now.index) == (7, "indexes/4")
    assert workspace.current.read_bytes() == workspace.published(7).read_bytes()
