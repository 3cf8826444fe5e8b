"""A DuckLake over a workspace's shards, its catalog in SQLite and in a real PostgreSQL."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from storage_schemas import tables
from storage_schemas.publishing.takedown import take_down
from storage_schemas.runs.records import UnknownRun
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql.lake import Lake, LakeConflict, LakeUnavailable
from storage_schemas.sql.views import RefusedStatement
from storage_schemas.workspace import Workspace
from tests.storage_schemas.postgres import postgres_server
from tests.storage_schemas.workspaces import (
    commit_shard,
    finish_run,
    first_version,
    plan_run,
    publish_run,
    shard_key,
    with_column,
    write_table,
)

pytestmark = pytest.mark.integration

pytest.importorskip("duckdb_extension_ducklake", reason="needs the extra `lake`")

ROOT = Path(__file__).parents[3]
RUN, SAMPLES = "run-1", 4
MANY = tuple(f"q{number:03d}" for number in range(40))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres_server() as connection:
        yield connection


# What several processes do at once is tried with both where there is time.
in_both = pytest.mark.parametrize(
    "catalog", [pytest.param("sqlite", marks=pytest.mark.slow), "postgres"], indirect=True
)


@pytest.fixture(params=["sqlite", "postgres"])
def catalog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty catalog."""
    if request.param == "sqlite":
        return f"sqlite:{tmp_path_factory.mktemp('catalog')}/it's a lake.sqlite"
    server = request.getfixturevalue("server")
    name = f"lake_{uuid.uuid4().hex[:8]}"
    database = duckdb.connect()
    from storage_schemas.sql.lake import _load_extension

    _load_extension(database, "postgres")
    database.execute(f"ATTACH '{server} dbname=postgres' AS server (TYPE postgres)")
    database.execute(f"CALL postgres_execute('server', 'CREATE DATABASE {name}', use_transaction => false)")
    return f"postgres:{server} dbname={name}"


def rows(lake: Lake, at: int | None = None) -> list[tuple[str, str, int, float]]:
    statement = "SELECT run, query_id, train_id, score FROM run_scores ORDER BY ALL"
    return [tuple(row.values()) for row in lake.query(statement, at=at).to_pylist()]


def expected(run: str, queries: tuple[str, ...], shift: float = 0.0) -> list[tuple[str, str, int, float]]:
    return sorted((run, query, train, float(train % 3) + shift) for query in queries for train in range(SAMPLES))


def newest(lake: Lake) -> int:
    return int(lake.query("SELECT max(snapshot) AS n FROM snapshots")["n"][0].as_py())


def test_committed_shards_are_registered_where_they_lie(tmp_path: Path, catalog: str) -> None:
    finish_run(tmp_path, RUN, queries=("q0", "it's", "q\n😀"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    lake = Lake(Workspace(tmp_path), catalog)
    assert lake.add(RUN) == 3
    assert rows(lake) == expected(RUN, ("q0", "it's", "q\n😀"))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet") if "lake" not in path.parts}
    assert after == before
    assert lake.add(RUN) == 0
    assert rows(lake) == expected(RUN, ("q0", "it's", "q\n😀"))


def test_a_growing_run_is_added_as_it_grows_and_old_snapshots_stay_readable(tmp_path: Path, catalog: str) -> None:
    lake = Lake(Workspace(tmp_path), catalog)
    plan_run(tmp_path, RUN, queries=("q0", "q1", "q2"))
    commit_shard(tmp_path, RUN, 1, "q1")
    assert lake.add(RUN) == 1
    first = newest(lake)
    commit_shard(tmp_path, RUN, 0, "q0")
    commit_shard(tmp_path, RUN, 2, "q2")
    assert lake.add(RUN) == 2
    finish_run(tmp_path, "run-2", queries=("q9",), shift=50.0)
    lake.add("run-2")
    assert rows(lake, at=first) == expected(RUN, ("q1",))
    assert rows(lake) == expected(RUN, ("q0", "q1", "q2")) + expected("run-2", ("q9",), 50.0)
    changes = lake.query("SELECT change FROM snapshots ORDER BY snapshot")["change"].to_pylist()
    assert [change for change in changes if change and change.endswith("shards")] == [
        "run run-1: 1 shards",
        "run run-1: 2 shards",
        "run run-2: 1 shards",
    ]


def test_a_removed_run_is_gone_from_now_on_and_can_come_back(tmp_path: Path, catalog: str) -> None:
    lake = Lake(Workspace(tmp_path), catalog)
    finish_run(tmp_path, RUN)
    finish_run(tmp_path, "run-2", queries=("q9",))
    lake.add(RUN)
    lake.add("run-2")
    held = newest(lake)
    lake.remove(RUN)
    assert rows(lake) == expected("run-2", ("q9",))
    assert len(rows(lake, at=held)) == 4 * SAMPLES
    with pytest.raises(LakeConflict, match="run run-1 is not in this lake"):
        lake.remove(RUN)
    assert lake.add(RUN) == 3
    assert len(rows(lake)) == 4 * SAMPLES


def test_a_shard_that_was_scored_anew_is_not_mixed_with_the_old_one(tmp_path: Path, catalog: str) -> None:
    lake = Lake(Workspace(tmp_path), catalog)
    finish_run(tmp_path, RUN)
    lake.add(RUN)
    (Workspace(tmp_path).score_shard(RUN, 1)).unlink()
    commit_shard(tmp_path, RUN, 1, "q1", shift=7.0)
    with pytest.raises(LakeConflict, match=r"shard 1 of run run-1 was scored anew.*fastgda lake remove run-1"):
        lake.add(RUN)
    lake.remove(RUN)
    lake.add(RUN)
    assert rows(lake) == sorted(expected(RUN, ("q0", "q2")) + expected(RUN, ("q1",), 7.0))


def test_vacuum_leaves_what_a_lake_reads(tmp_path: Path, catalog: str) -> None:
    workspace = Workspace(tmp_path)
    lake = Lake(workspace, catalog)
    finish_run(tmp_path, RUN)
    finish_run(tmp_path, "run-2", queries=("q9",))
    lake.add(RUN)
    compact(workspace, RUN)
    compact(workspace, "run-2")
    assert vacuum(workspace, older_than=timedelta(0)) == [workspace.score_shard("run-2", 0)]
    assert rows(lake) == expected(RUN, ("q0", "q1", "q2"))
    with pytest.raises(LakeConflict, match="was vacuumed, so it cannot be registered"):
        lake.add("run-2")
    lake.remove(RUN)
    assert len(vacuum(workspace, older_than=timedelta(0))) == 3


def test_a_run_that_is_older_than_a_column_opens_and_grows(
    tmp_path: Path, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered and committed by the release before, whose scores had fewer columns."""
    monkeypatch.setattr(tables, "SCORES", first_version(tables.SCORES))
    workspace = Workspace(tmp_path)
    lake = Lake(workspace, catalog)
    plan_run(tmp_path, RUN, queries=("q0", "q1", "q2"))
    commit_shard(tmp_path, RUN, 0, "q0")
    lake.add(RUN)
    commit_shard(tmp_path, RUN, 1, "q1")

    later = with_column(tables.SCORES, "noise", pa.float64(), 0.25, position=1)
    later = with_column(with_column(later, "note", pa.string(), "it's"), "deviation", pa.float32(), None)
    monkeypatch.setattr(tables, "SCORES", later)
    seen = "SELECT DISTINCT query_id, noise, note, deviation FROM run_scores ORDER BY ALL"
    old = (0.25, "it's", None)
    assert [tuple(row.values()) for row in lake.query(seen).to_pylist()] == [("q0", *old)]
    plan_run(tmp_path, "run-2", queries=("q9",))
    new: dict[str, object] = {"train_id": 0, "score": 1.0, "noise": 2.0, "note": "new", "deviation": 0.5}
    for run, shard, query in ((RUN, 2, "q2"), ("run-2", 0, "q9")):
        write_table(workspace.score_shard(run, shard), later, [{"query_id": query, **new}], shard_key(run, shard))
    assert (lake.add(RUN), lake.add("run-2")) == (2, 1)
    whole = [("q0", *old), ("q1", *old), ("q2", 2.0, "new", 0.5), ("q9", 2.0, "new", 0.5)]
    assert [tuple(row.values()) for row in lake.query(seen).to_pylist()] == whole


ADD = """
import sys
from pathlib import Path
from storage_schemas.sql import lake
from storage_schemas.workspace import Workspace

lake.SHARDS_AT_ONCE = 3
print("ready", flush=True)
sys.stdin.readline()
print(lake.Lake(Workspace(Path(sys.argv[1])), sys.argv[2]).add(sys.argv[3]), flush=True)
"""


def start(folder: Path, catalog: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", ADD, str(folder), catalog, RUN],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@in_both
def test_several_processes_that_add_the_same_run_register_each_shard_once(tmp_path: Path, catalog: str) -> None:
    finish_run(tmp_path, RUN, queries=MANY)
    lake = Lake(Workspace(tmp_path), catalog)
    processes = [start(tmp_path, catalog) for _ in range(3)]
    try:
        for process in processes:
            go(process)
        counts: list[int] = []
        while any(process.poll() is None for process in processes):
            try:
                counts.append(len(rows(lake)))
            except LakeUnavailable:  # nothing there yet
                assert not counts
            time.sleep(0.1)
        added = [int(process.communicate()[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sum(added) == len(MANY)
    assert all(count % SAMPLES == 0 for count in counts) and counts == sorted(counts)
    assert rows(lake) == expected(RUN, MANY)


@in_both
def test_a_writer_killed_at_any_instant_leaves_whole_batches(tmp_path: Path, catalog: str) -> None:
    finish_run(tmp_path, RUN, queries=MANY)
    lake = Lake(Workspace(tmp_path), catalog)
    waits = random.Random(0)
    for _ in range(5):
        process = start(tmp_path, catalog)
        go(process)
        time.sleep(waits.uniform(0.02, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    lake.add(RUN)
    assert rows(lake) == expected(RUN, MANY)
    assert lake.query("SELECT count(DISTINCT shard) AS n, count(*) AS m FROM registered").to_pylist() == [
        {"n": len(MANY), "m": len(MANY)}
    ]


def test_readers_cannot_write_nor_leave_the_workspace(tmp_path: Path, catalog: str) -> None:
    lake = Lake(Workspace(tmp_path), catalog)
    finish_run(tmp_path, RUN)
    lake.add(RUN)
    secret = tmp_path.parent / f"{tmp_path.name}-secret.csv"
    secret.write_text("a\n1\n")
    for statement in (
        "DELETE FROM lake.registered",
        "DROP TABLE lake.turns",
        f"COPY (SELECT 1) TO '{tmp_path / 'x.csv'}'",
        "ATTACH ':memory:' AS other",
        "SELECT * FROM ducklake_expire_snapshots('lake', versions => [1])",
        "SELECT * FROM postgres_query('__ducklake_metadata_lake', 'SELECT 1')",
        "SELECT * FROM \"SQLITE_SCAN\"('x', 'y')",
        "SELECT * FROM query('SELECT * FROM sqlite' || '_scan(1)')",
        "SELECT count(*) FROM __ducklake_metadata_lake.ducklake_snapshot",
        "SELECT 1; SELECT 2",
    ):
        with pytest.raises(RefusedStatement):
            lake.query(statement)
    with pytest.raises(duckdb.Error, match="Cannot access file"):
        lake.query(f"SELECT * FROM read_csv('{secret}')")
    assert rows(lake) == expected(RUN, ("q0", "q1", "q2"))


def test_what_is_not_there_is_said(tmp_path: Path, catalog: str) -> None:
    lake = Lake(Workspace(tmp_path), catalog)
    with pytest.raises(UnknownRun):
        lake.add(RUN)
    with pytest.raises(LakeUnavailable):
        lake.query("SELECT 1")
    finish_run(tmp_path, RUN)
    lake.add(RUN)
    with pytest.raises(LakeUnavailable, match="99"):
        lake.query("SELECT 1", at=99)
    with pytest.raises(duckdb.Error, match="no_such_table"):
        lake.query("FROM no_such_table")


@pytest.mark.parametrize("catalog_", ["", "lake.sqlite", "mysql:host=x", "sqlite:"])
def test_a_catalog_is_named_in_full(tmp_path: Path, catalog_: str) -> None:
    with pytest.raises(LakeUnavailable, match="a catalog is sqlite:FILE or postgres:CONNECTION"):
        Lake(Workspace(tmp_path), catalog_)


@pytest.mark.parametrize(
    "connection", ["host=127.0.0.1 port=1 user=me password=hunter2", "postgresql://me:hunter2@127.0.0.1:1/lake"]
)
def test_a_server_that_does_not_answer_is_said_without_the_password(tmp_path: Path, connection: str) -> None:
    finish_run(tmp_path, RUN)
    with pytest.raises(LakeUnavailable) as caught:
        Lake(Workspace(tmp_path), f"postgres:{connection}").add(RUN)
    assert "cannot be used" in str(caught.value) and "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_duckdb_without_the_extensions_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_run(tmp_path, RUN)
    monkeypatch.setattr(duckdb, "__version__", "2.0.0")
    with pytest.raises(LakeUnavailable, match=r"for DuckDB 2\.0\.0 is not installed: pip install 'fastgda\[lake\]'"):
        Lake(Workspace(tmp_path), f"sqlite:{tmp_path / 'c.sqlite'}").add(RUN)


def test_rows_that_nobody_knows_the_images_of_are_left_out_after_a_take_down(
    tmp_path: Path, catalog: str, caplog: pytest.LogCaptureFixture
) -> None:
    publish_run(tmp_path, RUN)
    workspace = Workspace(tmp_path)
    lake = Lake(workspace, catalog)
    lake.add(RUN)
    every = rows(lake)
    record = workspace.run(RUN)
    content = record.read_bytes()
    record.unlink()
    assert rows(lake) == every
    record.write_bytes(content)
    take_down(workspace, [2], reason="asked", by="them")
    assert rows(lake) == [row for row in every if row[2] != 2] != every
    record.unlink()
    assert rows(lake) == [] and f"rows of {RUN} are left out" in caplog.text
