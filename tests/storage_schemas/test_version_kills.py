"""Take-downs, promotions, rollbacks and prunings whose process is killed (SIGKILL) before one of its file operations.

The state that is left is the one before or the one after, and the next start completes what was begun.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.context import BaseContext
from pathlib import Path

import duckdb
import pytest

from storage_schemas.audit.verify import take_downs_fault, verify
from storage_schemas.commit import manifest_path
from storage_schemas.publishing.publish import update_published
from storage_schemas.publishing.serving import finish_pruning, promote_index, prune_indexes, rollback_index
from storage_schemas.publishing.takedown import lift, take_down
from storage_schemas.snapshots.published import Published, read_published
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql.views import query
from storage_schemas.tombstones import read_tombstones, removed_ids
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import commit_index, publish_run

pytestmark = pytest.mark.integration

PROCESSES = multiprocessing.get_context("fork")
CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"}
SAID = {"reason": "asked", "by": "them"}
Operation = Callable[[Workspace], object]

OPERATIONS: dict[str, Operation] = {
    "remove": lambda workspace: take_down(workspace, [2], **SAID),
    "undo": lambda workspace: lift(workspace, 1, **SAID),
    "promote": lambda workspace: promote_index(workspace, "d", force=True),
    "rollback": rollback_index,
    "prune": lambda workspace: prune_indexes(workspace, 0),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with four versions, the third of which is served, and one take-down."""
    root = tmp_path_factory.mktemp("begun") / "workspace"
    samples = publish_run(root).samples or ""
    workspace = Workspace(root)
    for version in "abcd":
        commit_index(workspace, version, samples, head=f"head-{version}", kind="Flat")
    for version in "abc":
        promote_index(workspace, version, force=True)
    take_down(workspace, [1], **SAID)
    return root


def until_killed(root: Path, operation: Operation, instant: int) -> None:
    """Do it, and die at the file operation of that number, before it happens."""
    left = instant

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    operation(Workspace(root))


def crashes(
    begun: Path, folder: Path, operation: Operation, stride: int, processes: BaseContext = PROCESSES
) -> Iterator[Workspace]:
    """What the death of the process leaves, at each `stride`-th instant; last, what it leaves when it lives."""
    for instant in range(0, 400, stride):
        root = folder / str(instant)
        shutil.copytree(begun, root)
        process = processes.Process(target=until_killed, args=(root, operation, instant))  # type: ignore[attr-defined]
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        yield Workspace(root)
        if process.exitcode == 0:
            assert instant > 2
            return
        shutil.rmtree(root)
    raise AssertionError("it never ended")


State = tuple[object, ...]


def state(workspace: Workspace) -> State:
    published = read_published(workspace)
    history = [each.index for each in published.served_before]
    removed = removed_ids(workspace, published.samples).tolist()
    return published.index, published.head, published.metrics, published.snapshot, history, removed


def assert_whole(workspace: Workspace) -> None:
    """What is served can answer, and nobody sees anything half done."""
    published = read_published(workspace)
    assert manifest_path(workspace.file(published.index or "") / "index.faiss").exists()
    assert (workspace.file(published.head or "") / "head.json").exists()
    assert take_downs_fault(workspace) == "" and verify(workspace) == []
    removed = set(removed_ids(workspace, published.samples).tolist())
    assert set(query(workspace.root, "SELECT train_id FROM ranks")["train_id"].to_pylist()) == {0, 1, 2, 3} - removed


def assert_complete(workspace: Workspace) -> None:
    """The catalog shows what is published and nothing that is taken down; nothing unfinished lies about."""
    published = read_published(workspace)
    with duckdb.connect(str(workspace.catalog), read_only=True) as catalog:
        served = catalog.execute("SELECT 'indexes/' || index_version FROM indexes WHERE served").fetchall()
        shown = {row[0] for row in catalog.execute("SELECT train_id FROM samples").fetchall()}
        versions = {row[0] for row in catalog.execute("SELECT index_version FROM indexes").fetchall()}
    assert served == [(published.index,)]
    assert shown == {0, 1, 2, 3} - set(removed_ids(workspace, published.samples).tolist())
    assert published.pruned == []
    folders = {each.name for each in (Path(str(workspace.root)) / "indexes").iterdir()}
    assert versions == folders
    vacuum(workspace, older_than=timedelta(0))
    assert not [path for path in Path(str(workspace.root)).rglob("*") if path.name.startswith(".fastgda")]


def again(name: str, workspace: Workspace, done: bool) -> None:
    """The next start: the same command where it was not done, else whatever comes next."""
    if not done or name in ("remove", "prune"):
        OPERATIONS[name](workspace)
        return

    def same(before: Published | None) -> Published | None:
        return before

    update_published(workspace, same)


@pytest.mark.parametrize(
    ("name", "stride"),
    [("remove", 2), ("undo", 2), ("promote", 3), ("rollback", 3), ("prune", 9)]
    + [pytest.param(name, 1, marks=pytest.mark.slow) for name in OPERATIONS],
)
def test_a_death_at_any_instant_leaves_the_state_before_or_after_and_the_next_start_completes_it(
    begun: Path, tmp_path: Path, name: str, stride: int
) -> None:
    expected = tmp_path / "expected"
    shutil.copytree(begun, expected)
    OPERATIONS[name](Workspace(expected))
    before, after = state(Workspace(begun)), state(Workspace(expected))
    assert before != after
    seen = set()
    for workspace in crashes(begun, tmp_path, OPERATIONS[name], stride):
        assert_whole(workspace)
        found = state(workspace)
        assert found in (before, after)
        seen.add(found == after)
        again(name, workspace, found == after)
        finish_pruning(workspace)
        assert state(workspace) == after
        assert_complete(workspace)
    assert seen == {True, False}


def test_records_that_many_processes_write_at_once_are_all_there(begun: Path, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(begun, root)
    barrier = PROCESSES.Barrier(8)

    def work(number: int) -> None:
        barrier.wait(60)
        take_down(Workspace(root), [number % 4], reason=f"by process {number}", by="them")

    processes = [PROCESSES.Process(target=work, args=(number,)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = read_tombstones(Workspace(root))
    assert [record.number for record in found.records] == list(range(1, found.number + 1))
    images = [each.image_sha256 for record in found.active for each in record.removed]
    assert len(images) == len(set(images)) == 4  # whoever came second saw that it was done
