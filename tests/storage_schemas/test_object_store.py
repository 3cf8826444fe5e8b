"""The same store in object stores: a real S3 API on loopback, and fsspec's store in memory."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from storage_schemas import tables
from storage_schemas.audit.verify import verify
from storage_schemas.commit import committed, manifest_path, read_manifest
from storage_schemas.files import AnyPath, any_path, create, file_sha256, is_there, matching, read_if_there
from storage_schemas.publishing.export import export_parquet
from storage_schemas.publishing.publish import publish_runs, retract_run, update_published
from storage_schemas.publishing.serving import promote_index, prune_indexes, rollback_index
from storage_schemas.publishing.takedown import lift, take_down
from storage_schemas.runs import lease
from storage_schemas.runs.attempts import AttemptLog, ShardState, read_attempts
from storage_schemas.runs.ledger import done_shards, read_ledger, rebuild_ledgers
from storage_schemas.runs.liveness import Beat, read_beats, write_beat
from storage_schemas.snapshots.published import Published, read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql.lake import Lake
from storage_schemas.sql.views import RefusedStatement, query
from storage_schemas.tombstones import read_tombstones, removed_ids
from storage_schemas.workspace import Workspace
from tests.object_store import empty_workspace, requests_counted
from tests.storage_schemas.workspaces import commit_index, commit_shard, finish_run, plan_run, shard_key

RUN, SAMPLES = "run-1", 4
QUERIES = ("q0", "it's [x] *", "q\n😀")


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.integration), "memory"])
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AnyPath:
    """An empty workspace."""
    if request.param == "memory":
        return any_path(f"memory://bucket-{uuid.uuid4().hex[:8]}/workspace")
    return empty_workspace(request.getfixturevalue("s3"), monkeypatch)


def counts(root: AnyPath, table: str = "scores") -> dict[str, tuple[int, float]]:
    rows = query(root, f"SELECT query_id, count(*) AS n, sum(score) AS s FROM {table} GROUP BY ALL").to_pylist()
    return {row["query_id"]: (row["n"], row["s"]) for row in rows}


@pytest.mark.heavy
def test_a_run_is_scored_published_compacted_and_retracted(root: AnyPath) -> None:
    workspace = Workspace.at(root)
    plan_run(root, RUN, queries=QUERIES)
    commit_shard(root, RUN, 1, QUERIES[1])
    assert done_shards(workspace, RUN) == {1}
    log = AttemptLog(workspace, RUN, worker="elsewhere:1")
    log.record(0, ShardState.running, device="cuda:0")
    log.record(0, ShardState.failed, device="cuda:0", error=MemoryError("out of memory"))
    assert rebuild_ledgers(workspace) == {RUN: 3}
    rows = query(root, "SELECT shard, state, attempts, error_class FROM shards ORDER BY shard").to_pylist()
    assert [(row["state"], row["attempts"], row["error_class"]) for row in rows] == [
        ("failed", 1, "MemoryError"),
        ("done", 1, ""),
        ("pending", 0, ""),
    ]
    assert counts(root, "run_scores") == {QUERIES[1]: (SAMPLES, 3.0)}
    for number in (0, 2):
        commit_shard(root, RUN, number, QUERIES[number])
    publish_runs(workspace, [RUN])
    whole = dict.fromkeys(QUERIES, (SAMPLES, 3.0))
    assert counts(root) == whole
    finish_run(root, "run-2", queries=("q0",), shift=10.0)
    publish_runs(workspace, [RUN, "run-2"])
    assert counts(root) == whole | {"q0": (SAMPLES, 43.0)}
    assert len(vacuum(workspace, older_than=timedelta(0))) == 4
    assert counts(root) == whole | {"q0": (SAMPLES, 43.0)}
    retract_run(workspace, "run-2")
    assert counts(root) == whole
    assert set(read_ledger(workspace, RUN)["state"].to_pylist()) == {"done"}
    assert verify(workspace) == []


def at_once(work: Callable[[int], None], count: int) -> None:
    """Call `work` with each number in a thread of its own."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_first_of_two_that_finish_a_shard_wins(root: AnyPath) -> None:
    path = root / "scores" / "file"
    won: list[int] = []

    def put(number: int) -> None:
        if create(path, str(number).encode() * 100):
            won.append(number)

    at_once(put, 8)
    assert len(won) == 1 and path.read_bytes() == str(won[0]).encode() * 100


def test_what_is_replaced_while_it_is_read_is_read_whole(root: AnyPath) -> None:
    """An object that is opened and replaced before it is read is gone for s3fs."""
    workspace, done = Workspace.at(root), threading.Event()
    plan_run(root, RUN, queries=QUERIES)
    log = AttemptLog(workspace, RUN, worker="elsewhere:1")

    def replace() -> None:
        number = 0
        while not done.is_set():
            number += 1
            write_beat(workspace, RUN, Beat(worker="elsewhere:1", beat=number, at=datetime.now(UTC)))
            log.record(0, ShardState.running)
            rebuild_ledgers(workspace)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(40):
            assert len(read_beats(workspace, RUN)) <= 1 and set(read_attempts(workspace, RUN)) <= {0}
            assert read_ledger(workspace, RUN).num_rows == len(QUERIES)
    finally:
        done.set()
        writer.join()
    assert [beat.worker for beat in read_beats(workspace, RUN)] == ["elsewhere:1"]


@pytest.mark.heavy
def test_what_several_change_at_once_of_what_is_published_is_all_there(root: AnyPath) -> None:
    workspace = Workspace.at(root)
    for run in ("old-0", "old-1", "new-0", "new-1"):
        finish_run(root, run, queries=(f"q-{run}",))
    publish_runs(workspace, ["old-0", "old-1"])

    def promote(before: Published | None) -> Published | None:
        return before and before.model_copy(update={"index": "indexes/i"})

    changes: list[Callable[[], object]] = [
        lambda: publish_runs(workspace, ["new-0"], add=True),
        lambda: publish_runs(workspace, ["new-1"], add=True),
        lambda: retract_run(workspace, "old-0"),
        lambda: update_published(workspace, promote),
    ]
    with ThreadPoolExecutor(len(changes)) as pool:
        for change in [pool.submit(change) for change in changes]:
            change.result(60)
    published = read_published(workspace)
    assert set(read_snapshot(workspace, published.snapshot).runs) == {"old-1", "new-0", "new-1"}
    assert (published.index, published.version) == ("indexes/i", 5)
    assert workspace.current.read_bytes() == workspace.published(5).read_bytes()


@pytest.mark.heavy
def test_versions_and_take_downs_are_steps_there_too(root: AnyPath) -> None:
    workspace = Workspace.at(root)
    finish_run(root, RUN, queries=QUERIES)
    samples = publish_runs(workspace, [RUN]).samples or ""
    for version in "abc":
        promote_index(workspace, commit_index(workspace, version, samples, kind="Flat"), force=True)
    for train_id in (1, 2):
        take_down(workspace, [train_id], reason="asked", by="them")
    lift(workspace, 1, reason="an error", by="us")
    assert [record.number for record in read_tombstones(workspace).records] == [1, 2, 3]
    with requests_counted() as asked:
        assert removed_ids(workspace, samples).tolist() == [2]
    assert asked == ({"LIST": 1, "GET": 3} if str(root).startswith("s3") else {})
    assert set(query(root, "SELECT train_id FROM ranks")["train_id"].to_pylist()) == {0, 1, 3}
    assert rollback_index(workspace)[0].index == "indexes/b"
    promote_index(workspace, "c", force=True)
    with ThreadPoolExecutor(3) as pool:
        pruned = [pool.submit(prune_indexes, workspace, 0) for _ in range(3)]
    assert {each.version for done in pruned for each in done.result(60)} == {"a", "b"}
    assert query(root, "SELECT index_version, served, stale FROM indexes").to_pylist() == [
        {"index_version": "c", "served": True, "stale": True}
    ]
    assert not matching(workspace.root / "indexes", "[ab]/*")


def test_a_name_that_is_being_taken_at_this_instant_is_taken(root: AnyPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """What S3 answers where two conditional PUTs meet, which the store of these tests does not."""
    met = ClientError({"Error": {"Code": "ConditionalRequestConflict", "Message": "conflict"}}, "PutObject")

    def refuse(*_: object, **__: object) -> None:
        raise translate_boto_error(met)

    assert not isinstance(root, Path)
    monkeypatch.setattr(root.fs, "pipe_file", refuse)
    assert not create(root / "scores" / "file", b"x")
    met.response["Error"]["Code"] = "SlowDown"
    with pytest.raises(OSError, match="conflict"):
        create(root / "scores" / "file", b"x")


def test_a_shard_whose_manifest_was_never_put_is_adopted(root: AnyPath) -> None:
    workspace = Workspace.at(root)
    plan_run(root, RUN, queries=QUERIES)
    commit_shard(root, RUN, 0, "q0")
    path = workspace.score_shard(RUN, 0)
    before = read_manifest(path)
    manifest_path(path).unlink()
    assert done_shards(workspace, RUN) == set()
    commit_shard(root, RUN, 0, "q0")
    after = committed(path, shard_key(RUN, 0))
    assert before is not None and after is not None and after.sha256 == before.sha256 == file_sha256(path)


@pytest.mark.heavy
def test_a_damaged_object_is_quarantined_and_made_again(root: AnyPath) -> None:
    workspace = Workspace.at(root)
    finish_run(root, RUN, queries=QUERIES)
    publish_runs(workspace, [RUN])
    shard = workspace.score_shard(RUN, 1)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    damages = verify(workspace)
    assert [damage.path for damage in damages] == ["scores/run-1/part-00001.parquet"]
    assert workspace.file(damages[0].moved_to).read_bytes() == bytes(content)
    assert query(root, "SELECT state FROM shards WHERE shard = 1")["state"].to_pylist() == ["quarantined"]
    assert counts(root) == dict.fromkeys(QUERIES, (SAMPLES, 3.0))
    commit_shard(root, RUN, 1, QUERIES[1])
    publish_runs(workspace, [RUN])
    assert verify(workspace) == []
    assert counts(root) == dict.fromkeys(QUERIES, (SAMPLES, 3.0))


@pytest.mark.heavy
def test_sql_reads_the_workspace_and_nothing_else(root: AnyPath, tmp_path: Path) -> None:
    finish_run(root, RUN, queries=QUERIES)
    publish_runs(Workspace.at(root), [RUN])
    other = str(root).replace("/workspace", "/other/x.parquet")
    any_path(other).write_bytes(tables.METRICS.encode(tables.METRICS.schema.empty_table(), {}))
    for statement in (f"FROM read_parquet('{other}')", "FROM read_csv('/etc/passwd')"):
        with pytest.raises(Exception, match="disabled by configuration"):
            query(root, statement)
    with pytest.raises(RefusedStatement):
        query(root, f"COPY (SELECT 1) TO '{other}'")
    assert read_published(Workspace.at(root)).run == RUN
    export_parquet(Workspace.at(root), RUN, tmp_path / "out.parquet")
    assert tables.read(tmp_path / "out.parquet", tables.RANKS).num_rows == len(QUERIES) * SAMPLES


@pytest.mark.heavy
def test_a_lake_registers_objects(root: AnyPath, tmp_path: Path) -> None:
    pytest.importorskip("duckdb_extension_ducklake", reason="needs the extra `lake`")
    finish_run(root, RUN, queries=QUERIES)
    lake = Lake(Workspace.at(root), f"sqlite:{tmp_path / 'lake.sqlite'}")
    assert lake.add(RUN) == 3
    rows = lake.query("SELECT query_id, count(*) AS n, sum(score) AS s FROM run_scores GROUP BY ALL").to_pylist()
    assert {row["query_id"]: (row["n"], row["s"]) for row in rows} == dict.fromkeys(QUERIES, (SAMPLES, 3.0))


def test_a_small_file_is_one_request_whether_or_not_it_is_there_and_so_is_a_folder(root: AnyPath) -> None:
    for name in ("a.json", "b.json", "b.txt", ".c.json", "below/d.json"):
        create(root / "folder" / name, b"x")
    with requests_counted() as asked:
        assert (read_if_there(root / "folder" / "a.json"), read_if_there(root / "folder" / "none")) == (b"x", None)
        assert (is_there(root / "folder" / "a.json"), is_there(root / "folder" / "none")) == (True, False)
        assert [path.name for path in matching(root / "folder", "*.json")] == ["a.json", "b.json"]
    assert asked == ({"GET": 4, "LIST": 1} if str(root).startswith("s3") else {})
    assert matching(root / "none", "*.json") == []
    assert [path.name for path in matching(root, "folder/*.txt")] == ["b.txt"]


def test_who_changes_nothing_of_what_is_published_lists_nothing_and_writes_nothing(root: AnyPath) -> None:
    workspace = Workspace.at(root)
    finish_run(root, RUN, queries=QUERIES)
    AttemptLog(workspace, RUN).record(0, ShardState.running)
    published = publish_runs(workspace, [RUN])
    with requests_counted() as asked:
        assert update_published(workspace, lambda before: before) == read_published(workspace) == published
    assert asked.keys() <= {"GET"}
    with requests_counted() as asked:
        assert publish_runs(workspace, [RUN]) == published
    assert asked["LIST"] <= 2 and asked.keys() <= {"GET", "HEAD", "LIST"}  # its attempts, its scores


def test_what_is_there_is_not_waited_for_nor_is_a_lease_looked_for(root: AnyPath) -> None:
    with requests_counted() as asked, lease.sole_maker(Workspace.at(root), "k", lambda: True, print):
        pass
    assert asked == {}


def test_one_of_several_makers_makes_it(root: AnyPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    workspace, made = Workspace.at(root), []

    def make(number: int) -> None:
        with lease.sole_maker(workspace, "k", lambda: bool(made), lambda owner: None):
            if not made:
                time.sleep(0.5)
                made.append(number)

    at_once(make, 4)
    assert len(made) == 1
