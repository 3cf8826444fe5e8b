"""Promotions, rollbacks and take-downs while threads search: each answer is of one version, and names no removed image.

Every version has vectors of its own, so that an answer shows which of them gave it.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastgda_core.search.build import add, new_index, write_index
from fastgda_core.search.searcher import Searcher
from storage_schemas.commit import commit
from storage_schemas.publishing.publish import update_published
from storage_schemas.publishing.serving import promote_index, rollback_index
from storage_schemas.publishing.takedown import take_down
from storage_schemas.snapshots.published import read_published
from storage_schemas.tombstones import Tombstones, read_tombstones, removed_ids
from storage_schemas.workspace import Workspace
from tasks.distilling.opened_index import open_search_index
from tests.storage_schemas.workspaces import commit_index, publish_run

pytestmark = pytest.mark.integration

SAMPLES, READERS, REMOVED = 40, 4, 12
VERSIONS = "abcd"
QUESTION = np.ones((1, 1), np.float32)


def similarities(version: str) -> np.ndarray:
    """The only number of each sample's vector in a version: the similarity to the question."""
    return np.random.default_rng(ord(version)).permutation(SAMPLES).astype(np.float32)[:, None]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    samples = publish_run(tmp_path, samples=SAMPLES).samples or ""
    workspace = Workspace(tmp_path)
    for version in VERSIONS:
        commit_index(workspace, version, samples, head=f"head-{version}", kind="Flat", train_ids=range(SAMPLES))
        index = new_index("Flat", 1)
        add(index, similarities(version), np.arange(SAMPLES))
        path = workspace.index(version) / "index.faiss"
        commit(path, lambda to, index=index: write_index(index, to), key=version, rows=SAMPLES, started=0.0)
        promote_index(workspace, version, force=True)
    return workspace


class Readers:
    """Threads that ask as a service does, and what each of them saw go wrong."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.stop, self.removed = workspace, threading.Event(), frozenset[int]()
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.threads = [threading.Thread(target=self._read) for _ in range(READERS)]

    def _read(self) -> None:
        opened: dict[str, Searcher] = {}
        known: Tombstones | None = None
        try:
            while not self.stop.is_set():
                before = self.removed  # what `take_down` returned for by now
                published = read_published(self.workspace)
                known = read_tombstones(self.workspace, known)
                version = (published.index or "").removeprefix("indexes/")
                if published.head != f"heads/head-{version}":
                    self.faults.append(f"{version} with {published.head}")
                if version not in opened:
                    opened[version] = open_search_index(self.workspace.file(published.index or ""), f"head-{version}")
                allowed = np.ones(SAMPLES, bool)
                allowed[removed_ids(self.workspace, published.index_samples, known)] = False
                similarity, found = opened[version].search(QUESTION, 10, allowed=allowed)
                if named := before & set(found[0].tolist()):
                    self.faults.append(f"{named} were taken down before")
                order = [each for each in np.argsort(-similarities(version)[:, 0]) if allowed[each]][:10]
                if found[0].tolist() != order or not np.array_equal(similarity[0], similarities(version)[order, 0]):
                    self.faults.append(f"{found[0].tolist()} is no answer of {version}")
                self.asked.append(version)
                time.sleep(0.005)  # a client's own time; else Python's lock is all that is under load
        except Exception as error:  # a thread's own end would be silent
            self.faults.append(repr(error))


@pytest.mark.parametrize("changes", [36, pytest.param(100, marks=pytest.mark.slow)])
def test_answers_under_promotions_rollbacks_and_removals_are_each_of_one_version(
    workspace: Workspace, changes: int
) -> None:
    readers, chance = Readers(workspace), np.random.default_rng(0)
    snapshot = read_published(workspace).snapshot
    for thread in readers.threads:
        thread.start()
    removals = iter(chance.permutation(SAMPLES)[:REMOVED].tolist())
    for number in range(changes):
        if number % 3 == 2 and read_published(workspace).served_before:
            rollback_index(workspace)
        else:
            promote_index(workspace, VERSIONS[chance.integers(len(VERSIONS))], force=True)
        if number % (changes // REMOVED) == 0 and (train_id := next(removals, None)) is not None:
            take_down(workspace, [train_id], reason="asked", by="them")
            readers.removed |= {train_id}
    deadline = time.monotonic() + 20  # so that each reader saw the end
    seen = len(readers.asked)
    while len(readers.asked) < seen + READERS and time.monotonic() < deadline:
        time.sleep(0.01)
    readers.stop.set()
    for thread in readers.threads:
        thread.join(20)
    assert readers.faults == []
    assert len(readers.asked) > changes and len(set(readers.asked)) > 1
    assert len(readers.removed) == REMOVED and read_published(workspace).snapshot == snapshot
    assert update_published(workspace, lambda before: before) == read_published(workspace)
