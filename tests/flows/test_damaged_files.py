"""A damaged file, or one of another release, is one line on the terminal and exit code 2."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.commands.main import _run
from storage_schemas import tables
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import finish_run, publish_run, spoil_column

Command = Callable[..., str]


@pytest.fixture
def fastgda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    def run(*arguments: str) -> str:
        """What a command that has to fail with exit code 2 says: one line."""
        monkeypatch.setattr(sys, "argv", ["fastgda", *arguments, "--workspace", str(tmp_path)])
        assert _run() == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1 and said.err.startswith("error: ")
        return said.err

    return run


def spoil_footer(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8 - int.from_bytes(content[-8:-4], "little")] ^= 0xFF
    path.write_bytes(content)


def spoil_rows(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * (len(content) // 3) + content[4 + len(content) // 3 :])


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def ranks_file(root: Path) -> Path:
    workspace = Workspace(root)
    (part,) = read_snapshot(workspace, read_published(workspace).snapshot).parts
    return Path(workspace.file(part.path))


def ledger(root: Path) -> Path:
    return Path(Workspace(root).ledger("run-1"))


def plan(root: Path) -> Path:
    return Path(Workspace(root).plan_shards("run-1"))


def planned_queries(root: Path) -> Path:
    return Path(Workspace(root).plan_queries("run-1"))


@pytest.mark.parametrize(
    ("arguments", "file", "column"),
    [
        (["status", "run-1"], plan, "pairs"),
        (["publish", "run-1"], planned_queries, "pairs"),
        (["sql", "FROM shards"], ledger, "state"),
    ],
    ids=["status", "publish", "sql"],
)
def test_a_flipped_bit_is_said_in_a_line(
    fastgda: Command, tmp_path: Path, arguments: list[str], file: Callable[[Path], Path], column: str
) -> None:
    publish_run(tmp_path, samples=500)
    path = file(tmp_path)
    spoil_column(path, column)
    said = fastgda(*arguments)
    assert f"{path} is damaged" in said and "`fastgda verify`" in said


@pytest.mark.parametrize(
    ("spoil", "statement"),
    [
        (spoil_footer, "SELECT sum(score) FROM ranks"),
        (spoil_rows, "SELECT sum(score) FROM ranks"),
        (cut_short, "SELECT count(*) FROM ranks"),
    ],
)
def test_sql_names_the_file_that_its_database_cannot_read(
    fastgda: Command, tmp_path: Path, spoil: Callable[[Path], None], statement: str
) -> None:
    publish_run(tmp_path, samples=500)
    path = ranks_file(tmp_path)
    spoil(path)
    said = fastgda("sql", statement)
    assert f"{path} is damaged" in said and "`fastgda verify`" in said


def test_a_shard_that_cannot_be_ranked_is_named(fastgda: Command, tmp_path: Path) -> None:
    finish_run(tmp_path, samples=500)
    path = Path(Workspace(tmp_path).score_shard("run-1", 1))
    spoil_footer(path)
    assert f"{path} is damaged" in fastgda("publish", "run-1")


def test_a_file_of_a_newer_release_is_said_in_a_line(fastgda: Command, tmp_path: Path) -> None:
    publish_run(tmp_path)
    newer = dataclasses.replace(tables.PLAN_SHARDS, version=3)
    plan(tmp_path).write_bytes(newer.encode(tables.read(plan(tmp_path), tables.PLAN_SHARDS), {}))
    assert "has schema version 3, this release reads 2 of plan_shards" in fastgda("status", "run-1")


def test_a_mistake_in_a_query_is_still_the_querys(fastgda: Command, tmp_path: Path) -> None:
    publish_run(tmp_path)
    assert "damaged" not in fastgda("sql", "SELECT error('the file is corrupt')")
