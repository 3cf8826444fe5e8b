"""What was indexed is in SQL at once, whatever becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgda_core.errors import UsageError
from storage_schemas.sql.views import query
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs.samples import ingest_samples
from tests import tiny
from tests.storage_schemas.workspaces import publish_run
from tests.tasks.configs import document

FAULTS = {"torn": "does not decode", "mute": "no caption"}


def lay_out(folder: Path, workspace: Path, first: int, *, faulty: bool) -> Context:
    image, _ = tiny.draw(7)
    bad = [("torn.jpg", image[:100]), ("torn.txt", b"a torn one"), ("mute.jpg", image)]
    tiny.write_tar(folder / "shapes.tar", [*(bad if faulty else []), *tiny.sample_members(range(first, first + 3))])
    changes = {"data__shards": str(folder / "*.tar")}
    return Context(PipelineConfig.model_validate(document(workspace=str(workspace), **changes)), "model")


def rejected(workspace: Path) -> dict[str, str]:
    rows = query(workspace, "SELECT key, reason FROM rejected_samples").to_pylist()
    return {row["key"]: next(fault for fault in FAULTS.values() if fault in row["reason"]) for row in rows}


def count(workspace: Path, view: str) -> int:
    return int(query(workspace, f"SELECT count(*) AS n FROM {view}")["n"][0].as_py())


@pytest.mark.heavy
def test_samples_and_rejections_are_in_sql_before_there_is_a_run(tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    good, bad = (lay_out(tmp_path / str(faulty), root, 0, faulty=faulty) for faulty in (False, True))
    ingest_samples.fn(bad)
    assert rejected(root) == FAULTS and count(root, "samples") == 3
    views = query(root, "SELECT table_name AS view FROM duckdb_columns() WHERE NOT internal GROUP BY ALL")
    others = set(views["view"].to_pylist()) - {"samples", "rejected_samples"}
    assert {"runs", "shards", "scores", "metrics"} <= others
    assert all(count(root, view) == 0 for view in others)
    ingest_samples.fn(good)
    assert rejected(root) == {}
    assert ingest_samples.fn(bad).reused
    assert rejected(root) == FAULTS


@pytest.mark.heavy
def test_rejections_of_the_newest_samples_stand_beside_the_published_ones(tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    publish_run(root)
    ingest_samples.fn(lay_out(tmp_path, root, 0, faulty=True))
    assert rejected(root) == FAULTS
    assert count(root, "samples") == 4, "the published ones"
    publish_run(root, "run-2")
    assert rejected(root) == FAULTS


def test_rejections_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ("\x1b[2J\u202e" + "long " * 30)
    ingest_samples.fn(lay_out(folder, tmp_path / "workspace", 0, faulty=True))
    lines = [line for line in capsys.readouterr().err.splitlines() if "shapes.tar" in line]
    assert len(lines) == len(FAULTS) and all(line.isprintable() and "\\u001b[2J\\u202elong" in line for line in lines)


def test_where_no_sample_can_be_used_sql_says_why(tmp_path: Path) -> None:
    context = lay_out(tmp_path, tmp_path / "workspace", 0, faulty=True)
    image, _ = tiny.draw(7)
    tiny.write_tar(
        tmp_path / "shapes.tar", [("torn.jpg", image[:100]), ("torn.txt", b"a torn one"), ("mute.jpg", image)]
    )
    for _ in range(2):
        with pytest.raises(UsageError, match=r"no usable sample; the first fault: .*torn: "):
            ingest_samples.fn(context)
        assert rejected(tmp_path / "workspace") == FAULTS
