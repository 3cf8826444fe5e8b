"""Inverted lists in a file of their own: the same answers, in less memory than the index, whatever happens to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from fastgda_core.search.build import new_index
from fastgda_core.search.on_disk import can_lie_on_disk
from fastgda_core.search.searcher import Searcher, SearchSettings
from storage_schemas.files import any_path
from storage_schemas.heads.records import INDEX_LISTS, IndexRecord, read_index_record
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace, part
from tasks.artifact import Artifact
from tasks.config.distilling import IndexConfig
from tasks.distilling import index_parts
from tasks.distilling.index import build_search_index, commit_version
from tasks.distilling.index_add import add_to_search_index, read_parent
from tasks.distilling.index_parts import IndexParts
from tasks.distilling.index_recall import HeldOut
from tasks.distilling.opened_index import open_search_index
from tasks.distilling.vectors import Block, read_vectors, write_vectors
from tasks.inputs.features import extract_features
from tests import tiny
from tests.tasks.whole_runs import SAMPLES, WholeRun

COUNT, EACH, WIDTH = 600, 50, 16
EVERYTHING = SearchSettings(nprobe=8)


def store(folder: Path, count: int, each: int, width: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    for number, start in enumerate(range(0, count, each)):
        block = Block(np.arange(start, start + each), vectors[start : start + each])
        write_vectors(part(folder, number), block, key="vectors", started=time.monotonic())
    return vectors


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float32]]:
    folder = tmp_path_factory.mktemp("stored")
    return folder, store(folder, COUNT, EACH, WIDTH)


def parts_of(vectors: Path, version: Path, kind: str, width: int = WIDTH, *, on_disk: bool = True) -> IndexParts:
    paths = sorted(vectors.glob("part-*.parquet"))
    lists = version / INDEX_LISTS if on_disk else None
    return IndexParts(version / "building", "key", kind, width, paths, np.empty(0, np.int64), lists)


def build(vectors: Path, version: Path) -> None:
    """Make a version as a build does, and clear up."""
    parts = parts_of(vectors, version, "IVF8,Flat")
    index = parts.whole(lambda _: None)
    held_out = HeldOut(read_vectors(parts.paths[0]).vectors[:8], "8 samples")
    about = IndexRecord(target=0.99, vectors=["vectors"])
    commit_version(version, "key", index, np.arange(COUNT), about, held_out, parts, None, started=time.monotonic())
    parts.clear()


def test_kinds_of_lists_alone_can_lie_on_disk() -> None:
    there = {kind: can_lie_on_disk(new_index(kind, WIDTH)) for kind in ("IVF8,Flat", "IVF8,PQ4", "OPQ4,IVF8,PQ4")}
    assert all(there.values()) and can_lie_on_disk(new_index("IVF8_HNSW8,RaBitQ4", WIDTH))
    for kind in ("Flat", "HNSW8,SQfp16", "IVF8,RaBitQfs", "IVF8,RaBitQ4,Refine(SQfp16)"):
        assert not can_lie_on_disk(new_index(kind, WIDTH))


@pytest.mark.parametrize("kind", ["IVF8,Flat", "IVF8,RaBitQ4", "OPQ4,IVF8,PQ4x4", "IVF8_HNSW8,SQ8"])
def test_lists_on_disk_answer_as_those_in_memory(
    kind: str, stored: tuple[Path, NDArray[np.float32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_parts, "GROUP_PARTS", 4)
    folder, vectors = stored
    one, other = (
        Searcher(parts_of(folder, tmp_path / str(on_disk), kind, on_disk=on_disk).whole(lambda _: None))
        for on_disk in (False, True)
    )
    every_other = np.arange(COUNT) % 2 == 0
    for settings in (SearchSettings(nprobe=2), EVERYTHING):
        for allowed in (None, every_other, np.arange(COUNT) < 9):
            mine, theirs = (each.search(vectors[:9], 10, allowed=allowed, settings=settings) for each in (one, other))
            assert np.array_equal(mine[0], theirs[0]) and np.array_equal(mine[1], theirs[1])
    if kind == "IVF8,Flat":
        scores = np.where(every_other, vectors[:9] @ vectors.T, -np.inf)
        found = other.search(vectors[:9], 10, allowed=every_other, settings=EVERYTHING)[1]
        assert np.array_equal(found, np.argsort(-scores, axis=1)[:, :10])


# Forks before FAISS ran in it; child n kills itself before its n-th change of a file, until one comes to its end.
KILLED = """
import os, signal, sys
from pathlib import Path
from storage_schemas.commit import code_version
from tasks.distilling import index_parts
from tests.tasks.distilling.test_index_on_disk import build, right
import pyarrow.dataset  # once, and not in each child, as what follows
code_version()
index_parts.GROUP_PARTS = 6
vectors, root = Path(sys.argv[1]), Path(sys.argv[2])
CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"}
for number in range(60):
    version = root / str(number) / "key"
    version.mkdir(parents=True)
    child = os.fork()
    if not child:
        left = number
        def hook(event, arguments):
            global left
            if event in CHANGES and str(root) in str(arguments):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        build(vectors, version)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
for each in range(number + 1):
    right(vectors, root / str(each) / "key")
print(number)
"""


def right(vectors: Path, version: Path) -> None:
    """A version is none or right, and once the build was started again it is right."""
    queries = read_vectors(part(vectors, 0)).vectors[:8]
    every = np.concatenate([read_vectors(path).vectors for path in sorted(vectors.glob("part-*.parquet"))])
    expected = np.argsort(-(queries @ every.T), axis=1)[:, :10]
    try:
        found = open_search_index(version).search(queries, 10, settings=EVERYTHING)[1]
        assert np.array_equal(found, expected)
    except UsageError as error:
        assert "`fastgda index build CONFIG`" in str(error)
    build(vectors, version)
    assert np.array_equal(open_search_index(version).search(queries, 10, settings=EVERYTHING)[1], expected)
    assert not (version / "building").exists()


@pytest.mark.integration
def test_a_build_that_is_killed_between_any_two_changes_goes_on(
    stored: tuple[Path, NDArray[np.float32]], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, stored[0], tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


# Each merge in a child of its own, forked before FAISS ran.
MERGED = """
import os, sys, threading
from pathlib import Path
from tasks.distilling import index_parts
from tasks.distilling.vectors import read_vectors
from tests.tasks.distilling.test_index_on_disk import parts_of
index_parts.GROUP_PARTS = 4
def anonymous():
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) * 1024
vectors, root = Path(sys.argv[1]), Path(sys.argv[2])
for case in sys.argv[3:]:
    if os.fork():
        os.wait()
        continue
    kind, where = case.split()
    if where == "at_once":
        index_parts.GROUP_PARTS, root = 99, root / where
    parts = parts_of(vectors, root / kind, kind, 256, on_disk=where == "disk")
    parts.empty()
    read_vectors(parts.paths[0])  # whose first use loads libraries
    before, peak, over = anonymous(), 0, threading.Event()
    def watch():
        global peak
        while not over.wait(0.001):
            peak = max(peak, anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    index = parts.whole(lambda _: None)
    over.set()
    thread.join()
    print(index.ntotal, peak - before, flush=True)
    os._exit(0)
"""


@pytest.mark.integration
def test_a_merge_takes_the_memory_that_it_is_said_to_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_parts, "GROUP_PARTS", 4)
    count, size = 32_000, 32_000 * 256 * 4
    store(tmp_path / "vectors", count, 1_000, 256)
    for kind in ("IVF8,Flat", "Flat"):
        parts = parts_of(tmp_path / "vectors", tmp_path / kind, kind, 256)
        for number in range(parts.count):
            parts.make(number, lambda _: None)
    cases = ("IVF8,Flat memory", "IVF8,Flat disk", "Flat memory", "Flat at_once")
    command = [sys.executable, "-c", MERGED, tmp_path / "vectors", tmp_path, *cases]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said[::2] == [str(count)] * 4
    lists, lists_on_disk, flat, at_once = (int(peak) / size for peak in said[1::2])
    assert lists > 0.9 and lists_on_disk < 0.2
    assert 0.9 < flat < 1.2 and 0.9 < at_once < 1.2


def test_an_index_beyond_its_memory_is_built_opened_and_refused_with_its_lists(
    similar: WholeRun, tmp_path: Path
) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(similar.workspace.root, root)
    index = IndexConfig(kind="IVF1,RaBitQ4", recall_queries=50, memory_gb=1e-6)
    config = similar.config.model_copy(update={"workspace": str(root), "index": index})
    context = type(similar.context)(config, similar.context.model_hash)
    workspace = Workspace.at(root)
    samples, head = (
        Artifact(each.name, each.key, workspace.file(similar.workspace.relative(each.path)), each.rows)
        for each in (similar.run.artifacts["samples"], similar.head.artifact)
    )
    features = extract_features.fn(context, samples).artifact
    built = build_search_index.fn(context, samples, features, head).artifact
    record = read_index_record(built.path)
    assert record.on_disk and record.recall_at_100 is not None and "stay on disk" in record.reason
    assert isinstance(built.path, Path)
    lists = built.path / INDEX_LISTS
    both = lists.stat().st_size + (built.path / "index.faiss").stat().st_size
    asked = f"SELECT size FROM indexes WHERE index_version = '{built.key}'"
    assert query(root, asked)["size"].to_pylist() == [both]

    before = {path: path.read_bytes() for path in built.path.iterdir() if path.is_file()}
    tar = tiny.write_tar(tmp_path / "new.tar", tiny.sample_members(range(100, 103)))
    added = add_to_search_index.fn(read_parent(workspace, built.key), [tar]).artifact
    assert read_index_record(added.path).on_disk and (added.path / INDEX_LISTS).stat().st_size > lists.stat().st_size
    ids = open_search_index(added.path).search(np.ones((1, 1), np.float32).repeat(record.width or 0, 1), 99)[1]
    assert sorted(ids[0].tolist()) == list(range(SAMPLES + 3))
    assert {path: path.read_bytes() for path in before} == before

    moved = shutil.copytree(built.path, tmp_path / "moved")
    assert open_search_index(moved).vectors == SAMPLES
    bucket = any_path(f"memory://{uuid.uuid4().hex}") / built.key
    for file, content in before.items():
        (bucket / file.name).write_bytes(content)
    assert open_search_index(bucket).vectors == SAMPLES
    whole = lists.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    for content, said in ((whole[:-1], "bytes and its manifest"), (flipped, "sha256"), (None, "is gone")):
        (moved / INDEX_LISTS).unlink()
        if content is not None:
            (moved / INDEX_LISTS).write_bytes(content)
        with pytest.raises(UsageError, match=f"{INDEX_LISTS}.*{said}") as refused:
            open_search_index(moved)
        assert "\n" not in str(refused.value)

    lists.unlink()
    again = build_search_index.fn(context, samples, features, head)
    assert not again.reused and open_search_index(built.path).vectors == SAMPLES
    assert json.loads((built.path / f"{INDEX_LISTS}.manifest.json").read_text())["rows"] == SAMPLES
