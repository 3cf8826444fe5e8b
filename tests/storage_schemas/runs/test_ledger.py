from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage_schemas.audit.verify import verify
from storage_schemas.commit import manifest_path
from storage_schemas.runs.attempts import MAX_ERROR, AttemptLog, ShardState
from storage_schemas.runs.ledger import done_shards, kept_ledger, read_ledger, read_run, rebuild_ledgers, write_plan
from storage_schemas.runs.records import UnknownRun
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql.views import query
from storage_schemas.tables import PLAN_QUERIES, PLAN_SHARDS
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import commit_shard, finish_run, plan_run, publish_run

RUN = "run-1"


def state_of(workspace: Workspace, shard: int = 0) -> tuple[str, int, str, str]:
    (row,) = [row for row in read_ledger(workspace, RUN).to_pylist() if row["shard"] == shard]
    return row["state"], row["attempts"], row["error_class"], row["error"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def test_a_shard_goes_from_pending_through_running_and_failed_to_done(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path, RUN)
    assert state_of(workspace) == ("pending", 0, "", "")
    log = AttemptLog(workspace, RUN)
    with pytest.raises(MemoryError), log.attempt(0, "cuda:1"):
        assert state_of(workspace) == ("running", 1, "", "")
        raise MemoryError("out of\nmemory 😀 \udcff")
    assert state_of(workspace)[:3] == ("failed", 1, "MemoryError")
    assert state_of(workspace)[3] == "out of\nmemory 😀 \\udcff"
    with log.attempt(0, "cuda:1"):
        assert state_of(workspace)[:2] == ("running", 2)
        commit_shard(tmp_path, RUN, 0, "q0")
    assert state_of(workspace) == ("done", 2, "", "")
    assert done_shards(workspace, RUN) == {0}
    assert {state_of(workspace, shard)[0] for shard in (1, 2)} == {"pending"}


def test_a_worker_that_died_leaves_its_shard_pending(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path, RUN)
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    AttemptLog(workspace, RUN, worker=f"{os.uname().nodename}:{process.pid}").record(0, ShardState.running)
    AttemptLog(workspace, RUN, worker="another-host:1").record(1, ShardState.running)
    assert state_of(workspace)[0] == "running"
    process.communicate()
    assert state_of(workspace)[:2] == ("pending", 1)
    assert state_of(workspace, 1)[0] == "running"


def test_a_line_that_a_crash_cut_short_is_passed_over(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path, RUN)
    AttemptLog(workspace, RUN).record(0, ShardState.failed, error=ValueError("x" * (2 * MAX_ERROR)))
    (path,) = tmp_path.glob("runs/*/attempts/*.jsonl")
    whole = path.read_bytes()
    for end in range(0, len(whole) - 1, 97):
        path.write_bytes(whole + whole[:end])
        assert state_of(workspace) == ("failed", 0, "ValueError", "x" * MAX_ERROR)


def test_records_of_many_workers_and_threads_are_all_kept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path, RUN)
    logs = [AttemptLog(workspace, RUN) for _ in range(2)]

    def record(log: AttemptLog) -> None:
        for _ in range(25):
            log.record(0, ShardState.running)

    threads = [threading.Thread(target=record, args=(log,)) for log in logs * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state_of(workspace)[1] == 200


@pytest.mark.heavy
def test_a_rebuilt_ledger_is_the_one_that_was_lost(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, RUN)
    plan_run(tmp_path, "run-2")
    AttemptLog(workspace, "run-2").record(1, ShardState.failed, error=OSError("no"))
    assert rebuild_ledgers(workspace) == {RUN: 3, "run-2": 3}
    before = query(tmp_path, "FROM shards ORDER BY run, shard")
    for run in (RUN, "run-2"):
        path = workspace.ledger(run)
        assert isinstance(path, Path)
        path.unlink()
    assert query(tmp_path, "FROM shards").num_rows == 0
    rebuild_ledgers(workspace)
    assert query(tmp_path, "FROM shards ORDER BY run, shard").equals(before)


def test_without_attempt_records_only_failures_are_forgotten(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path, RUN)
    commit_shard(tmp_path, RUN, 1, "q1")
    AttemptLog(workspace, RUN).record(0, ShardState.failed, error=OSError("no"))
    assert [state_of(workspace, shard)[0] for shard in range(3)] == ["failed", "done", "pending"]
    for path in tmp_path.glob("runs/*/attempts/*"):
        path.unlink()
    assert [state_of(workspace, shard)[0] for shard in range(3)] == ["pending", "done", "pending"]


def test_a_plan_is_written_once(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = plan_run(tmp_path, RUN)
    write_plan(
        workspace,
        first.model_copy(update={"shards": 0, "pairs": 0}),
        PLAN_SHARDS.schema.empty_table(),
        PLAN_QUERIES.schema.empty_table(),
    )
    assert read_run(workspace, RUN) == first
    assert read_ledger(workspace, RUN).num_rows == 3


def test_the_coordinator_leaves_a_ledger_however_it_ends(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path, RUN)
    states = "SELECT state FROM shards ORDER BY shard"
    with pytest.raises(KeyboardInterrupt), kept_ledger(workspace, RUN):
        assert query(tmp_path, states)["state"].to_pylist() == ["pending"] * 3
        commit_shard(tmp_path, RUN, 0, "q0")
        raise KeyboardInterrupt
    assert query(tmp_path, states)["state"].to_pylist() == ["done", "pending", "pending"]


def test_an_unknown_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnknownRun, match="has no run run-1; it has: none"):
        read_ledger(Workspace(tmp_path), RUN)


@pytest.mark.parametrize("compacted", [False, True])
def test_a_damaged_shard_is_quarantined_and_scored_again(tmp_path: Path, compacted: bool) -> None:
    workspace = Workspace(tmp_path)
    finish_run(tmp_path, RUN)
    if compacted:
        compact(workspace, RUN)
    path = workspace.score_shard(RUN, 1)
    assert isinstance(path, Path)
    good = path.read_bytes()
    flip(path)
    (damage,) = verify(workspace)
    assert damage.path == "scores/run-1/part-00001.parquet" and "sha256" in damage.reason
    assert not path.exists() and not manifest_path(path).exists()
    assert (tmp_path / damage.moved_to).exists()
    state, _, error_class, error = state_of(workspace, 1)
    assert (state, error_class) == ("quarantined", "DamagedFile") and error == damage.reason
    assert done_shards(workspace, RUN) == {0, 2}
    commit_shard(tmp_path, RUN, 1, "q1")
    assert path.read_bytes() == good
    assert done_shards(workspace, RUN) == {0, 1, 2}
    assert verify(workspace) == []


@pytest.mark.heavy
def test_a_damaged_part_is_made_again_from_its_shards(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, RUN)
    (part,) = tmp_path.glob("ranks/*/part-*.parquet")
    good = part.read_bytes()
    before = query(tmp_path, "FROM ranks").to_pylist()
    flip(part)
    (damage,) = verify(workspace)
    assert damage.path == part.relative_to(tmp_path).as_posix()
    assert query(tmp_path, "FROM ranks").to_pylist() == before
    assert part.read_bytes() == good
    assert verify(workspace) == []


@pytest.mark.parametrize("garbage", [b"", b"{", b'{"rows": 3}'])
def test_a_damaged_manifest_is_found(tmp_path: Path, garbage: bytes) -> None:
    workspace = Workspace(tmp_path)
    finish_run(tmp_path, RUN)
    path = manifest_path(workspace.score_shard(RUN, 2))
    path.write_bytes(garbage)
    (damage,) = verify(workspace)
    assert damage.reason == "its manifest cannot be read"
    assert state_of(workspace, 2)[0] == "quarantined"


def test_a_damaged_part_whose_shards_are_gone_makes_its_run_incomplete(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, RUN)
    vacuum(workspace, older_than=timedelta(0))
    (part,) = tmp_path.glob("ranks/*/part-*.parquet")
    flip(part)
    assert len(verify(workspace)) == 1
    assert done_shards(workspace, RUN) == set()
    for shard, name in enumerate(("q0", "q1", "q2")):
        commit_shard(tmp_path, RUN, shard, name)
    assert done_shards(workspace, RUN) == {0, 1, 2}
    compact(workspace, RUN)
    assert query(tmp_path, "SELECT count(*) AS n, max(rank) AS r FROM ranks").to_pylist() == [{"n": 12, "r": 4}]


def test_an_unknown_run_is_answered_with_those_that_were_planned_last(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for day, name in enumerate("zyxwvut", start=1):
        path = workspace.run(plan_run(tmp_path, name).run)
        record = read_run(workspace, name).model_copy(update={"created_at": datetime(2026, 1, day, tzinfo=UTC)})
        path.write_text(record.model_dump_json())
    with pytest.raises(UnknownRun, match=r"it has: x, w, v, u, t$"):
        read_run(workspace, "a")
