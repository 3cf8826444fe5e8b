"""Commands on index versions, take-downs and differences, as people type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from flows.commands.main import app
from storage_schemas.errors import StoreError
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.snapshots.published import read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import commit_index, finish_run, publish_run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    publish_run(tmp_path)
    monkeypatch.setenv("FASTGDA_WORKSPACE", str(tmp_path))
    return tmp_path


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str) -> str:
    with pytest.raises((UsageError, StoreError)) as error:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    return str(error.value)


def test_a_configuration_in_place_of_a_command_is_built(tmp_path: Path) -> None:
    for arguments in (["absent.yaml"], ["build", "absent.yaml"], ["--head", "h", "absent.yaml"]):
        assert "config absent.yaml does not exist" in refused("index", *arguments)
    assert "promote" in said("index", "--help") and "--head" in said("index", "build", "--help")


@pytest.mark.heavy
def test_versions_are_listed_promoted_rolled_back_and_pruned(root: Path) -> None:
    workspace = Workspace(root)
    published = read_published(workspace)
    for version in "abc":
        precision = {"q0": 0.5, "q1": 0.5} if version != "b" else {"q0": 0.1, "q1": 0.1}
        made = {"head": version, "precision": precision, "snapshot": published.snapshot}
        commit_index(workspace, version, published.samples or "", **made)
    assert "index a is served: number 2" in said("index", "promote", "a")
    assert "its mAP(100) is 0.100" in refused("index", "promote", "b")
    said("index", "promote", "b", "--force")
    said("index", "promote", "c")
    listed = {each["version"]: each for each in json.loads(said("index", "list", "--json"))}
    assert {name: (each["served"], each["rollbacks"]) for name, each in listed.items()} == {
        "a": (False, 2),
        "b": (False, 1),
        "c": (True, None),
    }
    assert listed["b"]["precision"] == {published.snapshot: 0.1}
    table = said("index", "list")
    assert "served" in table and "2 back" in table and "0.100" in table and "mAP(100)" in table
    assert "index b is served again, in place of c" in said("index", "rollback")
    said("index", "promote", "c")
    assert "1 versions would be deleted" in said("index", "prune", "--keep", "1", "--dry-run")
    gone = said("index", "prune", "--keep", "1")
    assert "index a: " in gone and "1 versions are deleted" in gone
    assert {each["version"] for each in json.loads(said("index", "list", "--json"))} == {"b", "c"}


@pytest.mark.heavy
def test_what_would_go_is_shown_and_goes_only_when_that_is_meant(root: Path) -> None:
    hostile = "\x1b[31mx'); DROP TABLE samples; --"
    assert "add --yes" in refused("remove", "2", "--reason", "asked")
    assert not (root / "tombstones").exists()
    assert "--reason is empty" in refused("remove", "2", "--yes")
    assert "name the train_ids" in refused("remove", "--reason", "x", "--yes")
    shown = said("remove", "2", "--reason", hostile, "--by", "Ada", "--yes")
    assert "runs that held it, stale from then on: run-1" in shown and "taken down: record 1" in shown
    rows = query(root, "SELECT train_id, reason, removed_by, in_force FROM tombstones").to_pylist()
    assert rows == [{"train_id": 2, "reason": hostile, "removed_by": "Ada", "in_force": True}]
    assert query(root, "SELECT train_id FROM samples")["train_id"].to_pylist() == [0, 1, 3]
    assert "2 was taken down before, by record 1" in said("remove", "2", "--reason", "again", "--yes")
    assert "name its number alone" in refused("remove", "2", "--undo", "1", "--reason", "x")
    assert "take-down 1 is lifted, by record 2" in said("remove", "--undo", "1", "--reason", "an error")
    assert "every pair occurs once" in said("verify")
    first = root / "tombstones" / "00001.json"
    first.write_text(first.read_text().replace("Ada", "Bob"))
    done = CliRunner().invoke(app, ["verify"])
    assert done.exit_code == 1 and "the record before is not what it was" in done.stdout
    assert first.exists(), "moved away it would hide nothing"


@pytest.mark.heavy
def test_two_snapshots_are_compared(root: Path) -> None:
    before = read_published(Workspace(root)).snapshot
    finish_run(root, "run-2", queries=("q2", "q3"))
    after = publish_runs(Workspace(root), ["run-1", "run-2"]).snapshot
    rows = json.loads(said("diff", before, after, "-k", "2", "--json"))
    assert [(row["query_id"], row["change"], row["entered"], row["dropped"]) for row in rows] == [
        ("q3", "new", [2, 1], [])
    ]
    assert "queries by their first 10 samples: 1 new" in said("diff", before, after)
    assert "queries by their first 10 samples: none changed" in said("diff", after, after)
    assert "has no snapshot x" in refused("diff", "x", after)
