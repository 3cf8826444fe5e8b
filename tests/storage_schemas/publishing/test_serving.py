"""Which index version answers: promotion against what is served, the way back, and what is deleted."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage_schemas.commit import manifest_path
from storage_schemas.files import AnyPath, read_if_there
from storage_schemas.heads import records
from storage_schemas.publishing.index_versions import IndexVersion, index_versions
from storage_schemas.publishing.publish import publish_runs, retract_run
from storage_schemas.publishing.serving import (
    NotPromoted,
    NoWayBack,
    finish_pruning,
    promote_index,
    prune_indexes,
    rollback_index,
)
from storage_schemas.publishing.takedown import take_down
from storage_schemas.runs.ledger import read_run
from storage_schemas.snapshots.published import NotPublished, Published, read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import commit_index, finish_run, plan_run, publish_run, show

GOOD = {f"q{number}": 0.8 for number in range(8)}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    publish_run(tmp_path)
    return Workspace(tmp_path)


def made(workspace: Workspace, version: str, **about: object) -> str:
    """An index of the published samples, with a head of its own, measured on the published snapshot."""
    published = read_published(workspace)
    defaults = {"head": f"head-{version}", "precision": GOOD, "snapshot": published.snapshot, "kind": "Flat"}
    recalls = {"recall_at_10": 1.0, "recall_at_100": 1.0}
    return commit_index(workspace, version, published.samples or "", **{**defaults, **recalls, **about})


def served(workspace: Workspace) -> str:
    return (read_published(workspace).index or "").removeprefix("indexes/")


def versions(workspace: Workspace) -> dict[str, IndexVersion]:
    return {each.version: each for each in index_versions(workspace, read_published(workspace))}


def scores(published: Published) -> tuple[object, ...]:
    return published.snapshot, published.run, published.created_at, published.samples, published.exact_check


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"precision": dict.fromkeys(GOOD, 0.7)}, r"its mAP\(100\) is 0.700, that of a, which is served, 0.800"),
        ({"recall_at_10": 0.9}, "its recall@10 is 0.900, that of a, which is served, 1.000"),
        ({"recall_at_100": 0.97}, "its recall@100 is 0.970"),
        ({"recall_at_10": None}, "its recall@10 was not measured"),
        ({"precision": None}, "nobody measured how its head head-b ranks: `fastgda evaluate CONFIG --index b`"),
    ],
)
def test_a_version_that_is_worse_than_what_is_served_is_refused_unless_forced(
    workspace: Workspace, about: dict[str, object], why: str
) -> None:
    promote_index(workspace, made(workspace, "a"))
    before = read_published(workspace)
    made(workspace, "b", **about)
    with pytest.raises(NotPromoted, match=why) as refusal:
        promote_index(workspace, "b")
    assert "`fastgda index promote b --force` serves it all the same" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert read_published(workspace) == before
    promote_index(workspace, "b", force=True)
    assert served(workspace) == "b"


def test_a_difference_that_chance_explains_is_no_reason(workspace: Workspace) -> None:
    promote_index(workspace, made(workspace, "a"))
    # The mean of the differences is -0.0125, their standard error 0.0225.
    near = {name: 0.8 + (-0.1, 0.05, 0.05, -0.05)[number % 4] for number, name in enumerate(GOOD)}
    now = promote_index(workspace, made(workspace, "b", precision=near, recall_at_100=0.985))
    assert (now.index, now.metrics) == ("indexes/b", "metrics/head-b.parquet")


def test_what_cannot_answer_beside_what_is_published_is_refused_even_by_force(
    workspace: Workspace, tmp_path: Path
) -> None:
    other = finish_run(tmp_path, "run-2", samples=3)
    commit_index(workspace, "other", other.samples or "", precision=GOOD, head="o", run="run-2")
    made(workspace, "headless")
    (tmp_path / "heads" / "head-headless" / "head.json").unlink()
    made(workspace, "growing")
    manifest_path(workspace.index("growing") / "index.faiss").unlink()
    for version, why in (
        ("other", "where a train_id means another image"),
        ("headless", "head head-headless, which index headless answers through, is gone"),
        ("growing", "there is no index 'growing'"),
        ("../../etc", "there is no index"),
    ):
        with pytest.raises(NotPromoted, match=why):
            promote_index(workspace, version, force=True)
    assert read_published(workspace).index is None


def test_a_version_with_samples_added_behind_is_served_and_they_can_be_taken_down(
    workspace: Workspace, tmp_path: Path
) -> None:
    grown = plan_run(tmp_path, "grown", samples=6)
    promote_index(workspace, made(workspace, "a"))
    commit_index(workspace, "b", grown.samples or "", head="head-a", kind="Flat", train_ids=range(6))
    now = promote_index(workspace, "b", force=True)
    assert (now.index_samples, now.samples) == (grown.samples, read_run(workspace, "run-1").samples)
    take_down(workspace, [1, 5], reason="asked", by="them")
    assert query(workspace.root, "SELECT train_id FROM samples")["train_id"].to_pylist() == [0, 2, 3, 4]
    assert set(query(workspace.root, "SELECT train_id FROM ranks")["train_id"].to_pylist()) == {0, 2, 3}
    assert rollback_index(workspace)[0].index_samples == now.samples


def test_a_version_without_a_removed_image_is_not_replaced_by_one_that_holds_it(workspace: Workspace) -> None:
    made(workspace, "old")
    promote_index(workspace, "old")
    take_down(workspace, [1], reason="asked", by="them")
    assert versions(workspace)["old"].stale
    promote_index(workspace, made(workspace, "new", train_ids=[0, 2, 3]))
    assert not versions(workspace)["new"].stale
    with pytest.raises(NotPromoted, match="it holds images that were taken down"):
        promote_index(workspace, "old")


def test_rollbacks_lead_back_one_by_one_and_leave_the_scores(workspace: Workspace) -> None:
    for version in "abc":
        promote_index(workspace, made(workspace, version))
    promote_index(workspace, "c")  # again: nothing changes
    before = read_published(workspace)
    assert [each.rollbacks for each in map(versions(workspace).__getitem__, "abc")] == [2, 1, None]
    for version in "ba":
        now, left = rollback_index(workspace)
        assert (now.index, now.head, now.metrics) == (
            f"indexes/{version}",
            f"heads/head-{version}",
            f"metrics/head-{version}.parquet",
        )
        assert left == chr(ord(version) + 1) and scores(now) == scores(before)
    with pytest.raises(NoWayBack, match="nothing was served before"):
        rollback_index(workspace)
    promote_index(workspace, "c")
    assert rollback_index(workspace)[0].index == "indexes/a"


def test_what_answered_comes_back_by_a_rollback_when_its_data_is_published_again(
    workspace: Workspace, tmp_path: Path
) -> None:
    promote_index(workspace, made(workspace, "a"))
    finish_run(tmp_path, "run-2", samples=5)
    assert publish_runs(workspace, ["run-2"]).index is None
    with pytest.raises(NoWayBack):
        rollback_index(workspace)  # a train_id means another image now
    publish_runs(workspace, ["run-1"])
    now, left = rollback_index(workspace)
    assert (now.index, left) == ("indexes/a", None)
    retract_run(workspace, "run-1")
    with pytest.raises(NoWayBack, match="has no published run"):
        rollback_index(workspace)


def test_pruning_leaves_what_is_served_what_rollbacks_lead_to_and_what_is_newer(workspace: Workspace) -> None:
    with pytest.raises(NotPublished, match="no index is served"):
        prune_indexes(workspace, 1)
    made(workspace, "never")
    for version in "abcd":
        promote_index(workspace, made(workspace, version))
    made(workspace, "newer")
    size = sum(path.stat().st_size for path in (workspace.index("a")).iterdir())
    gone = {each.version: each.size for each in prune_indexes(workspace, 1, dry_run=True)}
    assert gone.keys() == {"never", "a", "b"} and gone["a"] == size
    assert versions(workspace).keys() == {"never", "a", "b", "c", "d", "newer"}
    assert {each.version for each in prune_indexes(workspace, 1)} == gone.keys()
    assert versions(workspace).keys() == {"c", "d", "newer"}
    assert not any(workspace.index(version).exists() for version in gone)
    assert read_published(workspace).pruned == [] and served(workspace) == "d"
    assert rollback_index(workspace)[0].index == "indexes/c"
    with pytest.raises(NoWayBack):
        rollback_index(workspace)
    with pytest.raises(NotPromoted, match="there is no index 'b'"):
        promote_index(workspace, "b", force=True)


def test_a_deletion_that_was_interrupted_is_completed_and_meanwhile_nothing_is_promoted_to_it(
    workspace: Workspace,
) -> None:
    for version in "ab":
        promote_index(workspace, made(workspace, version))
    show(workspace, pruned=["a"], served_before=[])  # as a process leaves it that dies before it deletes
    with pytest.raises(NotPromoted, match="is being deleted"):
        promote_index(workspace, "a", force=True)
    with pytest.raises(NoWayBack):
        rollback_index(workspace)
    finish_pruning(workspace)
    assert versions(workspace).keys() == {"b"} and read_published(workspace).pruned == []


def test_the_list_reads_each_record_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        made(workspace, name)
    promote_index(workspace, "a")
    read: list[str] = []

    def look(path: AnyPath) -> bytes | None:
        read.append(workspace.relative(path))
        return read_if_there(path)

    monkeypatch.setattr(records, "read_if_there", look)
    index_versions(workspace, read_published(workspace))
    assert sorted(name for name in read if name.endswith("index.json")) == [
        f"indexes/{name}/index.json" for name in ("a", "b")
    ]


def test_the_list_says_what_each_version_is(workspace: Workspace) -> None:
    promote_index(workspace, made(workspace, "a", kind="HNSW32,SQfp16", recall_at_100=0.99))
    (found,) = index_versions(workspace, read_published(workspace))
    assert (found.version, found.kind, found.head, found.vectors) == ("a", "HNSW32,SQfp16", "head-a", 4)
    assert (found.recall_at_10, found.recall_at_100, found.served, found.stale) == (1.0, 0.99, True, False)
    assert found.samples == read_published(workspace).samples and found.rollbacks is None
    assert found.size == sum(each.stat().st_size for each in os.scandir(workspace.index("a")))
    assert {snapshot: round(each.mean, 3) for snapshot, each in found.precision.items()} == {
        read_published(workspace).snapshot: 0.8
    }
    assert found.built_at is not None and found.built_at <= datetime.now(UTC)
