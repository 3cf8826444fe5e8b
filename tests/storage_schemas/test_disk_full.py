"""A disk that is full in the middle of a commit, a compaction or a publication: a small tmpfs."""

from __future__ import annotations

import errno
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage_schemas import tables
from storage_schemas.audit.verify import verify
from storage_schemas.commit import TableCommit, commit_tables
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.runs.ledger import done_shards, read_run, write_ledger
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.published import read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import plan_run, shard_key

pytestmark = pytest.mark.integration

QUERIES = tuple(f"q{number}" for number in range(40))
SAMPLES = 4000
RUN = "run-1"


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A disk of its own in a new folder."""
    folder.mkdir()
    mount(folder, options)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte."""
    with mounted(tmp_path / "disk", "size=512k") as folder:
        yield folder


def make_room(disk: Path) -> None:
    mount(disk, "remount,size=64m")


def score_missing(workspace: Workspace) -> None:
    for number in sorted(set(range(len(QUERIES))) - done_shards(workspace, RUN)):
        chance = random.Random(number)
        rows = tables.SCORES.rows(
            query_id=[QUERIES[number]] * SAMPLES,
            train_id=range(SAMPLES),
            score=[chance.random() for _ in range(SAMPLES)],
        )
        path, key = workspace.score_shard(RUN, number), shard_key(RUN, number)
        commit_tables([TableCommit(path, rows, tables.SCORES, key, time.monotonic())])


def assert_full(work: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="make room and start the same command again; what is finished is kept") as caught:
        work()
    assert caught.value.errno == errno.ENOSPC


def assert_unharmed(disk: Path) -> None:
    assert verify(Workspace(disk)) == []
    assert not [path for path in disk.rglob("*") if path.name.startswith(".")]


def fill(disk: Path) -> Path:
    """A file that takes all the room."""
    path = disk / "other"
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue
    return path


def test_commits_stop_with_a_clear_error_and_go_on_when_there_is_room(disk: Path) -> None:
    workspace = Workspace(disk)
    plan_run(disk, RUN, queries=QUERIES, samples=4)
    assert_full(lambda: score_missing(workspace))
    done = done_shards(workspace, RUN)
    assert 0 < len(done) < len(QUERIES)
    assert_unharmed(disk)
    before = {number: workspace.score_shard(RUN, number).stat().st_mtime_ns for number in done}
    make_room(disk)
    score_missing(workspace)
    assert done_shards(workspace, RUN) == set(range(len(QUERIES)))
    assert {number: workspace.score_shard(RUN, number).stat().st_mtime_ns for number in done} == before
    assert query(disk, "SELECT count(DISTINCT (query_id, train_id)) AS n FROM run_scores")["n"].to_pylist() == [
        len(QUERIES) * SAMPLES
    ]
    assert_unharmed(disk)


@pytest.mark.parametrize("step", [compact, lambda workspace, run: publish_runs(workspace, [run])], ids=["c", "p"])
def test_a_full_disk_leaves_what_is_published_as_it_was(disk: Path, step: Callable[[Workspace, str], object]) -> None:
    workspace = Workspace(disk)
    make_room(disk)
    for run in ("old", RUN):
        queries = QUERIES if run == RUN else ("other",)
        plan_run(disk, run, queries=queries, samples=SAMPLES)
        record = read_run(workspace, run)
        for number in range(record.shards):
            rows = tables.SCORES.rows(
                query_id=[queries[number]] * SAMPLES, train_id=range(SAMPLES), score=[0.5] * SAMPLES
            )
            path = workspace.score_shard(run, number)
            commit_tables([TableCommit(path, rows, tables.SCORES, shard_key(run, number), time.monotonic())])
    before = publish_runs(workspace, ["old"])
    filler = fill(disk)
    assert_full(lambda: step(workspace, RUN))
    assert read_published(workspace) == before
    assert query(disk, "SELECT count(*) AS n FROM ranks")["n"].to_pylist() == [SAMPLES]
    assert_unharmed(disk)
    filler.unlink()
    step(workspace, RUN)
    publish_runs(workspace, [RUN])
    assert query(disk, "SELECT count(*) AS n FROM ranks")["n"].to_pylist() == [SAMPLES * len(QUERIES)]


def test_a_ledger_that_cannot_be_written_leaves_the_one_before(disk: Path) -> None:
    workspace = Workspace(disk)
    plan_run(disk, RUN, queries=QUERIES, samples=4)
    before = write_ledger(workspace, RUN)
    AttemptLog(workspace, RUN).record(0, ShardState.failed)  # what would be written differs
    fill(disk)
    assert_full(lambda: write_ledger(workspace, RUN))
    assert tables.read(workspace.ledger(RUN), tables.SHARDS).equals(before)
