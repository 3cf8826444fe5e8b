"""Workspaces that earlier releases made: they open, answer, train and publish, and nothing is scored again."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from storage_schemas.audit.verify import verify
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.ledger import run_names
from storage_schemas.snapshots.published import read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.compatibility.make_workspace import answer
from tests.flows.pipeline_case import fastgda

ARCHIVES = sorted(Path(__file__).parent.glob("workspace-*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def shapes(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with `config.yaml`, what it needs, its workspace, and `expected.json`."""
    with tarfile.open(request.param) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "shapes"


def test_there_is_a_workspace_to_open() -> None:
    assert ARCHIVES


def test_it_opens_answers_and_publishes(shapes: Path) -> None:
    expected, workspace = json.loads((shapes / "expected.json").read_text()), Workspace(shapes / "workspace")
    rows = query(workspace.root, "SELECT query_id, train_id, score FROM scores ORDER BY ALL").to_pylist()
    assert [list(row.values()) for row in rows] == expected["scores"]
    found = query(workspace.root, "SELECT DISTINCT table_name AS name FROM duckdb_columns() WHERE NOT internal")
    names = set(found["name"].to_pylist())
    assert {"scores", "ranks", "metrics", "samples", "queries", "runs", "heads"} <= names
    for name in names:
        query(workspace.root, f"SELECT * FROM {name}")
    assert answer(workspace.root) == expected["answer"]
    before = read_published(workspace)
    (run,) = run_names(workspace)
    assert verify(workspace) == []
    published = publish_runs(workspace, [run])
    assert (published.snapshot, published.index) == (before.snapshot, before.index)


def test_another_head_is_trained_and_nothing_is_scored_again(shapes: Path, home: Path) -> None:
    config, workspace = shapes / "config.yaml", shapes / "workspace"
    scores = {path: path.stat().st_mtime_ns for path in (workspace / "scores").rglob("*")}
    config.write_text(config.read_text().replace("learning_rate: 1.0e-30", "learning_rate: 1.0e-4"))
    fastgda("train", config, home=home)
    fastgda("index", config, home=home)
    heads = query(workspace, "SELECT head, best_epoch FROM heads").to_pylist()
    assert len(heads) == 2 and all(head["best_epoch"] is not None for head in heads)
    assert scores == {path: path.stat().st_mtime_ns for path in (workspace / "scores").rglob("*")}
