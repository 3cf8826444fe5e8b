"""Real processes that score, compact, publish, vacuum and read, and are killed at random instants."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage_schemas import tables
from storage_schemas.audit.verify import duplicated_pairs, verify
from storage_schemas.commit import TableCommit, commit_tables, committed
from storage_schemas.errors import StoreError
from storage_schemas.files import leftovers
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.ledger import done_shards, kept_ledger, read_compaction, read_ledger, read_run, run_names
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import plan_run, shard_key

pytestmark = pytest.mark.integration

SAMPLES = 40
QUERIES = {"run-1": tuple(f"q{number:03d}" for number in range(30)), "run-2": tuple(f"q{n:03d}" for n in range(28, 34))}
SHIFT = {"run-1": 0.0, "run-2": 1000.0}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.storage_schemas.test_kills"])

Ranks = dict[tuple[str, int], tuple[float, int, float]]  # score, rank and rank label by query_id and train_id


def score(run: str, query: int, train: int) -> float:
    return float((train * 7 + query) % 13) + SHIFT[run]


def expected(*runs: str) -> Ranks:
    """The rows that a snapshot of these runs must hold, by plain sorting."""
    found: Ranks = {}
    for run in runs:
        for number, name in enumerate(QUERIES[run]):
            scores = {train: score(run, number, train) for train in range(SAMPLES)}
            order = sorted(scores, key=lambda train, scores=scores: (-scores[train], train))
            found |= {
                (name, train): (scores[train], place, float(np.float32(place / SAMPLES)))
                for place, train in enumerate(order, start=1)
            }
    return found


SNAPSHOTS = [expected("run-1"), expected("run-1", "run-2")]


def shard_rows(run: str, number: int) -> pa.Table:
    trains = range(SAMPLES)
    return tables.SCORES.rows(
        query_id=[QUERIES[run][number]] * SAMPLES, train_id=trains, score=[score(run, number, t) for t in trains]
    )


def work(root: Path, seed: int) -> None:
    """A worker: commits what is missing of any run, a few shards at once, in an order of its own."""
    workspace, order = Workspace(root), random.Random(seed)
    for run in run_names(workspace):
        missing = sorted(set(range(read_run(workspace, run).shards)) - done_shards(workspace, run))
        order.shuffle(missing)
        for start in range(0, len(missing), 3):
            commit_tables(
                [
                    TableCommit(
                        workspace.score_shard(run, number),
                        shard_rows(run, number),
                        tables.SCORES,
                        shard_key(run, number),
                        time.monotonic(),
                    )
                    for number in missing[start : start + 3]
                ]
            )
            time.sleep(0.01)  # as a teacher takes its time


def coordinate(root: Path) -> None:
    """A coordinator: keeps the ledgers, publishes what is finished, cleans up, until both runs are published."""
    _small_parts()
    workspace = Workspace(root)
    with kept_ledger(workspace, "run-1") as refresh:
        published: list[str] = []
        while published != list(QUERIES):
            refresh()
            finished = [run for run in QUERIES if len(done_shards(workspace, run)) == len(QUERIES[run])]
            if finished and finished[0] == "run-1" and finished != published:
                publish_runs(workspace, finished)
                published = finished
            time.sleep(0.002)
    vacuum(workspace, older_than=timedelta(0))


def read(root: Path, stop: Any, failures: Any) -> None:
    """A reader: whatever is published must be whole, at any instant."""
    allowed = {(len(rows), len(rows), sum(row[0] for row in rows.values())) for rows in SNAPSHOTS}
    workspace, looks, seen = Workspace(root), 0, 0
    while not stop.is_set():
        try:
            read_published(workspace)
        except StoreError:
            assert not seen, "what was published is gone"
        else:
            statement = "SELECT count(*) AS n, count(DISTINCT (query_id, train_id)) AS d, sum(score) AS s FROM ranks"
            (row,) = query(root, statement, threads=1).to_pylist()
            if tuple(row.values()) not in allowed or row["n"] < seen:
                failures.put(f"saw {row}")
            seen = row["n"]
        query(root, "SELECT state, count(*) FROM shards GROUP BY ALL", threads=1)
        looks += 1
    failures.put(f"looked {looks} times")


def _small_parts() -> None:
    compact.__kwdefaults__["part_rows"] = 10 * SAMPLES  # type: ignore[index]  # several parts out of few rows


@contextmanager
def reading(root: Path) -> Iterator[None]:
    """A reader in a process of its own beside the block; anything wrong that it saw fails the test."""
    stop, failures = PROCESSES.Event(), PROCESSES.Queue()
    reader = PROCESSES.Process(target=read, args=(root, stop, failures))
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join(60)
    assert reader.exitcode == 0, "the reader raised; its traceback is above"
    found = failures.get(timeout=10)
    assert found.startswith("looked"), found
    assert found != "looked 0 times"


def started(*works: tuple[Any, ...]) -> list[ForkServerProcess]:
    """Processes, each calling a function with its arguments, that begin at the same instant."""
    barrier = PROCESSES.Barrier(len(works) + 1)
    processes = [PROCESSES.Process(target=_begin, args=(barrier, *work)) for work in works]
    for process in processes:
        process.start()
    barrier.wait(60)
    return processes


def _begin(barrier: Any, target: Any, *arguments: Any) -> None:
    import pyarrow.dataset  # noqa: F401  # it is imported at the first read, and takes longer than the work here

    barrier.wait(60)
    target(*arguments)


def killed_run(root: Path, chance: random.Random) -> int:
    """Plan two runs, and let workers and a coordinator do them, killed and started again until all is published.

    Returns:
        How many were killed.
    """
    for run, queries in QUERIES.items():
        plan_run(root, run, queries=queries, samples=SAMPLES)
    kills, longest = 0, 0.4
    with reading(root):
        while True:
            processes = started(*((work, root, chance.randrange(1000)) for _ in range(2)), (coordinate, root))
            time.sleep(chance.uniform(0.0, longest))
            longest += 0.05  # so that a busy machine comes to an end
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                assert process.exitcode in (0, -signal.SIGKILL)
                kills += process.exitcode == -signal.SIGKILL
            if processes[-1].exitcode == 0:
                return kills


def assert_exactly_the_plan(root: Path) -> None:
    workspace = Workspace(root)
    rows = query(root, "SELECT query_id, train_id, score, rank, rank_label FROM ranks").to_pylist()
    found = {(r["query_id"], r["train_id"]): (r["score"], r["rank"], r["rank_label"]) for r in rows}
    assert len(rows) == len(found)
    assert found == SNAPSHOTS[-1]
    for run in QUERIES:
        assert set(read_ledger(workspace, run)["state"].to_pylist()) == {"done"}
        compaction = read_compaction(workspace, run)
        assert compaction is not None
        assert sum(part.rows for part in compaction.parts) == read_run(workspace, run).pairs
    assert verify(workspace) == []
    assert not list(root.rglob("scores/*/part-*.parquet")), "vacuumed"
    vacuum(workspace, older_than=timedelta(0))
    assert not [path for path in root.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_whose_processes_are_killed_at_random_ends_with_every_pair_once(tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    killed = 0
    for number in itertools.count():
        root = tmp_path / f"workspace-{number}"
        root.mkdir()
        killed += killed_run(root, chance)
        assert_exactly_the_plan(root)
        if killed >= kills:
            break


def test_two_workers_that_finish_the_same_shards_leave_one_copy(tmp_path: Path) -> None:
    for run, queries in QUERIES.items():
        plan_run(tmp_path, run, queries=queries, samples=SAMPLES)
    for worker in started(*[(work, tmp_path, 5)] * 4):  # all in the same order
        worker.join(60)
        assert worker.exitcode == 0
    workspace = Workspace(tmp_path)
    for run, queries in QUERIES.items():
        assert done_shards(workspace, run) == set(range(len(queries)))
        assert duplicated_pairs(workspace, run) == 0
        names = {path.name for path in tmp_path.glob(f"scores/{run}/*")}
        assert names == {
            f"part-{n:05d}.parquet{suffix}" for n in range(len(queries)) for suffix in ("", ".manifest.json")
        }
        for number in range(len(queries)):
            path = workspace.score_shard(run, number)
            assert committed(path, shard_key(run, number))
            assert tables.read(path, tables.SCORES).equals(shard_rows(run, number))
    assert verify(workspace) == []


def test_a_growing_run_is_read_in_whole_shards(tmp_path: Path) -> None:
    plan_run(tmp_path, "run-1", queries=QUERIES["run-1"], samples=SAMPLES)
    (worker,) = started((work, tmp_path, 1))
    counts = [0]
    statement = "SELECT count(*) AS n, count(DISTINCT (query_id, train_id)) AS d FROM run_scores"
    while worker.is_alive() or counts[-1] < len(QUERIES["run-1"]) * SAMPLES:
        (row,) = query(tmp_path, statement, threads=1).to_pylist()
        assert row["n"] == row["d"] and row["n"] % SAMPLES == 0 and row["n"] >= counts[-1]
        counts.append(row["n"])
    assert not list(leftovers(tmp_path))
