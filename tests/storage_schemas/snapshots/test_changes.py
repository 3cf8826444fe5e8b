"""What changed between two snapshots, beside plain Python over the scores that were written."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from storage_schemas import tables
from storage_schemas.commit import TableCommit, commit_tables
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.publishing.takedown import lift, take_down
from storage_schemas.runs.ledger import read_run
from storage_schemas.snapshots.changes import answers_changed
from storage_schemas.snapshots.published import NotPublished
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import plan_run, shard_key, write_table

SAMPLES = 40
Scores = dict[str, list[float]]


def scored(root: Path, run: str, scores: Scores, samples: int = SAMPLES) -> str:
    """A finished run with these scores; returns its snapshot once it is published alone."""
    plan_run(root, run, queries=tuple(scores), samples=samples)
    for number, (query_id, values) in enumerate(scores.items()):
        rows = tables.SCORES.rows(query_id=[query_id] * samples, train_id=range(samples), score=values)
        path = Workspace(root).score_shard(run, number)
        commit_tables([TableCommit(path, rows, tables.SCORES, shard_key(run, number), time.monotonic())])
    return publish_runs(Workspace(root), [run]).snapshot


def top(values: list[float], k: int, removed: set[int]) -> list[int]:
    return [t for t in sorted(range(len(values)), key=lambda t: (-values[t], t)) if t not in removed][:k]


def expected(one: Scores, two: Scores, k: int, removed: set[int]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for name in one.keys() | two.keys():
        olds, news = (top(of[name], k, removed) if name in of else [] for of in (one, two))
        if olds == news:
            continue
        common = set(olds) & set(news)
        change = "new" if not olds else "gone" if not news else "reordered" if set(olds) == set(news) else "changed"
        found[name] = {
            "change": change,
            "overlap": len(common) / max(len(olds), len(news)),
            "moved": sum(olds.index(each) != news.index(each) for each in common),
            "entered": [each for each in news if each not in common],
            "dropped": [each for each in olds if each not in common],
        }
    return found


def found(root: Path, before: str, after: str, k: int) -> dict[str, dict[str, object]]:
    rows = answers_changed(Workspace(root), before, after, k).to_pylist()
    assert [row["query_id"] for row in rows] == sorted(row["query_id"] for row in rows)
    names = ("change", "overlap", "moved", "entered", "dropped")
    return {row["query_id"]: {name: row[name] for name in names} for row in rows}


@pytest.mark.heavy
def test_changes_are_those_that_plain_sorting_finds_and_none_names_a_removed_sample(tmp_path: Path) -> None:
    chance = random.Random(0)
    one: Scores = {f"q{n}": [float(chance.randrange(20)) for _ in range(SAMPLES)] for n in range(6)}
    two: Scores = {name: list(values) for name, values in one.items() if name != "q0"}
    two["q1"] = [chance.random() for _ in range(SAMPLES)]
    first, second, *_ = top(one["q2"], 2, set())
    two["q2"][first], two["q2"][second] = 50.0, 51.0  # the first two change places
    two["q3"][top(one["q3"], 30, set())[-1]] = 99.0
    two["q9"] = [chance.random() for _ in range(SAMPLES)]
    before, after = scored(tmp_path, "one", one), scored(tmp_path, "two", two)
    for k in (1, 5, 10, 100):
        assert found(tmp_path, before, after, k) == expected(one, two, k, set())
    removed = {top(two["q3"], 1, set())[0], top(one["q2"], 1, set())[0]}
    take_down(Workspace(tmp_path), sorted(removed), reason="asked", by="them")
    for k in (1, 5, 10):
        assert found(tmp_path, before, after, k) == expected(one, two, k, removed)
    view = query(tmp_path, "SELECT query_id, entered, dropped, before, after FROM answers_changed").to_pylist()
    assert {row["query_id"] for row in view} == expected(one, two, 10, removed).keys()
    assert {(row["before"], row["after"]) for row in view} == {(before, after)}
    assert not removed & {each for row in view for each in (*row["entered"], *row["dropped"])}
    lift(Workspace(tmp_path), 1, reason="an error", by="us")
    assert found(tmp_path, before, after, 5) == expected(one, two, 5, set())


@pytest.mark.heavy
def test_an_image_that_got_another_number_is_the_same_image(tmp_path: Path) -> None:
    one: Scores = {"q0": [float(-train) for train in range(4)]}
    before = scored(tmp_path, "one", one, samples=4)
    old = read_run(Workspace(tmp_path), "one").samples
    # The data without sample 0: the others are numbered anew.
    two: Scores = {"q0": [float(-train) for train in range(3)]}
    after = scored(tmp_path, "two", two, samples=3)
    new = read_run(Workspace(tmp_path), "two").samples
    assert new != old and new is not None
    path = Workspace(tmp_path).file(new)
    rows = tables.read(path, tables.SAMPLES).to_pylist()
    shifted = [row | {"image_sha256": f"{row['train_id'] + 1:064x}"} for row in rows]
    write_table(path, tables.SAMPLES, shifted, path.parent.name)
    assert found(tmp_path, before, after, 2) == {
        "q0": {"change": "changed", "overlap": 0.5, "moved": 1, "entered": [1], "dropped": [0]}
    }
    with pytest.raises(NotPublished, match="has no snapshot nothing"):
        answers_changed(Workspace(tmp_path), "nothing", after)


@pytest.mark.heavy
def test_files_that_both_snapshots_have_are_not_read(tmp_path: Path) -> None:
    one: Scores = {"q0": [float(train) for train in range(SAMPLES)]}
    before = scored(tmp_path, "one", one)
    more = {"q1": [float(train) for train in range(SAMPLES)]}
    scored(tmp_path, "two", more)
    after = publish_runs(Workspace(tmp_path), ["one", "two"]).snapshot
    (shared,) = tmp_path.glob("ranks/one/*.parquet")
    shared.write_bytes(b"unreadable")
    assert found(tmp_path, before, after, 3) == {
        "q1": {"change": "new", "overlap": 0.0, "moved": 0, "entered": [39, 38, 37], "dropped": []}
    }
