"""An index is built in parts that a kill does not lose, and opened only where it is as it was committed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from fastgda_core.search.build import read_index
from fastgda_core.search.searcher import Searcher, SearchSettings
from storage_schemas import tables
from storage_schemas.heads.records import IndexRecord, read_index_record
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace, part
from tasks.artifact import Artifact
from tasks.config.distilling import IndexConfig
from tasks.distilling import index_parts
from tasks.distilling.index import build_search_index, make_index_parts
from tasks.distilling.index_parts import IndexParts
from tasks.distilling.opened_index import open_search_index
from tasks.distilling.vectors import Block, blocks_of, read_vectors, write_vectors
from tasks.inputs.features import extract_features
from tests.tasks.whole_runs import SAMPLES, WholeRun

COUNT, EACH, WIDTH, PARTS = 600, 50, 16, 3
KINDS = ("Flat", "IVF8,Flat", "IVF8,RaBitQ4,Refine(SQfp16)", "HNSW8,SQfp16")
EVERYTHING = SearchSettings(nprobe=8, ef_search=200, k_factor=8.0)
# Builds the index of a folder and kills itself once so many vectors are in.
BUILDER = """
import os, signal, sys
from pathlib import Path
from tasks.distilling import index_parts
folder, kind, after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
index_parts.GROUP_PARTS, index_parts.SAVED_AFTER = 4, 0.0
seen = 0
def advance(count):
    global seen
    seen += count
    if seen >= after:
        os.kill(os.getpid(), signal.SIGKILL)
paths = sorted((folder / "vectors").glob("part-*.parquet"))
index_parts.IndexParts(folder / "building", "key", kind, 16, paths).whole(advance)
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float32]]:
    """A folder with vectors in twelve parts, and the vectors."""
    folder = tmp_path_factory.mktemp("stored")
    vectors = np.random.default_rng(0).standard_normal((COUNT, WIDTH)).astype(np.float32)
    for number, start in enumerate(range(0, COUNT, EACH)):
        block = Block(np.arange(start, start + EACH), vectors[start : start + EACH])
        write_vectors(part(folder / "vectors", number), block, key="vectors", started=time.monotonic())
    return folder, vectors


def parts_in(folder: Path, stored: Path, kind: str, removed: tuple[int, ...] = ()) -> IndexParts:
    paths = sorted((stored / "vectors").glob("part-*.parquet"))
    return IndexParts(folder / "building", "key", kind, WIDTH, paths, np.array(removed, np.int64))


def answers(parts: IndexParts, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    kept = np.setdiff1d(np.arange(COUNT), parts.removed)
    return Searcher(parts.whole(lambda _: None), kept, EVERYTHING).search(vectors[:20], 10)[1]


def test_vectors_are_read_as_they_were_written(stored: tuple[Path, NDArray[np.float32]]) -> None:
    folder, vectors = stored
    paths = sorted((folder / "vectors").glob("part-*.parquet"))
    assert np.array_equal(np.concatenate([block.vectors for block in blocks_of(paths)]), vectors)
    left = [block.train_ids for block in blocks_of(paths, np.array([0, 7, *range(50, 100)]))]
    assert np.array_equal(np.concatenate(left), np.setdiff1d(np.arange(COUNT), [0, 7, *range(50, 100)]))
    assert paths[0].stat().st_size < 1.2 * EACH * WIDTH * 4 + 3000


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_in_parts_answers_as_brute_force_and_without_what_was_removed(
    kind: str, stored: tuple[Path, NDArray[np.float32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_parts, "GROUP_PARTS", 4)
    folder, vectors = stored
    removed = (3, *range(100, 150), 599)
    expected = np.argsort(-(vectors[:20] @ vectors.T), axis=1)
    for left_out in ((), removed):
        parts = parts_in(tmp_path / str(len(left_out)), folder, kind, left_out)
        assert parts.count == PARTS and parts.mergeable == (kind != "HNSW8,SQfp16")
        right = np.array([row[~np.isin(row, left_out)][:10] for row in expected])
        found = answers(parts, vectors)
        assert not np.isin(found, left_out).any()
        assert np.mean([len(set(mine) & set(row)) for mine, row in zip(found, right, strict=True)]) >= 9
        parts.clear()
        assert not parts.folder.exists()  # type: ignore[union-attr]


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["IVF8,RaBitQ4,Refine(SQfp16)", "HNSW8,SQfp16"])
def test_a_build_that_was_killed_goes_on_and_gives_the_same_index(
    kind: str, stored: tuple[Path, NDArray[np.float32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_parts, "GROUP_PARTS", 4)
    folder, vectors = stored
    shutil.copytree(folder / "vectors", tmp_path / "vectors")
    killed = [sys.executable, "-c", BUILDER, str(tmp_path), kind, "250"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    assert subprocess.run(killed, env=environment, check=False, capture_output=True).returncode == -signal.SIGKILL
    building = tmp_path / "building"
    kept = {path.name: path.stat().st_mtime_ns for path in building.glob("*-0000[01].faiss")}
    assert len(kept) == 1, "the first part is there, the second was under way"
    parts = parts_in(tmp_path, tmp_path, kind)
    resumed = answers(parts, vectors)
    assert all((building / name).stat().st_mtime_ns == at for name, at in kept.items()), "it was not made again"
    assert np.array_equal(resumed, answers(parts_in(tmp_path / "anew", folder, kind), vectors))


@pytest.fixture
def opened(similar: WholeRun, tmp_path: Path) -> Path:
    """A copy of a finished index."""
    return Path(shutil.copytree(similar.index.artifact.path, tmp_path / similar.index.artifact.key))


def test_an_index_is_opened_by_whoever_asks_for_its_head(opened: Path, similar: WholeRun) -> None:
    assert open_search_index(opened, similar.head.artifact.key).vectors == SAMPLES
    with pytest.raises(UsageError, match=f"is of head {similar.head.artifact.key}, not other"):
        open_search_index(opened, "other")


def test_an_index_that_is_not_what_was_committed_is_refused_in_one_line(opened: Path) -> None:
    path = opened / "index.faiss"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for content, said in ((bytes(flipped), "sha256"), (whole[:-1], "bytes and its manifest"), (b"", "0 bytes")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=said) as refused:
            open_search_index(opened)
        assert "`fastgda index build CONFIG`" in str(refused.value) and "\n" not in str(refused.value)
    path.write_bytes(whole)
    assert open_search_index(opened).vectors == SAMPLES
    path.unlink()
    with pytest.raises(UsageError, match="is gone"):
        open_search_index(opened)
    (opened / "index.faiss.manifest.json").unlink()
    with pytest.raises(UsageError, match="holds no finished index"):
        open_search_index(opened)


def test_an_index_of_another_release_of_faiss_is_refused(opened: Path) -> None:
    record = json.loads((opened / "index.json").read_text())
    (opened / "index.json").write_text(json.dumps({**record, "faiss": "1.13.2"}))
    with pytest.raises(UsageError, match=r"was built with FAISS 1\.13\.2 and this is .*from its vectors"):
        open_search_index(opened)
    (opened / "index.json").write_text(json.dumps({**record, "faiss": f"{record['faiss']}.1"}))
    assert open_search_index(opened).vectors == SAMPLES


def test_the_record_says_kind_reason_and_recall_and_sql_shows_them(similar: WholeRun) -> None:
    record = read_index_record(similar.index.artifact.path)
    assert (record.kind, record.rows, record.recall_at_10, record.recall_at_100) == ("Flat", SAMPLES, 1.0, 1.0)
    assert record.recall_queries == 1000 and "12 queries, 988 samples" in record.recall_of
    assert record.reason.startswith(f"{SAMPLES} vectors of {record.width}: every vector is looked at")
    assert record.samples == similar.workspace.relative(similar.run.artifacts["samples"].path)
    columns = "head, kind, recall_at_10, recall_at_100, parent, vectors"
    rows = query(similar.workspace, f"SELECT {columns} FROM indexes").fetchall()
    assert (similar.head.artifact.key, "Flat", 1.0, 1.0, "", SAMPLES) in rows


def test_a_record_of_an_earlier_release_is_still_read() -> None:
    record = IndexRecord.model_validate_json('{"head": "h", "samples": "s", "origin": "", "code_version": "0.2"}')
    assert (record.kind, record.recall_at_10, record.vectors, record.parent) == ("", None, [], "")


@pytest.mark.heavy
def test_another_kind_is_built_from_the_same_vectors_by_several_workers(similar: WholeRun, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(similar.workspace.root, root)
    index = IndexConfig(kind="IVF2,RaBitQ4,Refine(SQfp16)", recall_queries=50)
    config = similar.config.model_copy(update={"workspace": str(root), "index": index})
    context = type(similar.context)(config, similar.context.model_hash)
    workspace = Workspace.at(root)
    before = {path: path.stat().st_mtime_ns for path in root.glob("vectors/*/*.parquet")}
    assert len(before) == 1
    run, head = similar.run, similar.head.artifact
    samples, head = (
        Artifact(each.name, each.key, workspace.file(similar.workspace.relative(each.path)), each.rows)
        for each in (run.artifacts["samples"], head)
    )
    features = extract_features.fn(context, samples).artifact
    with pytest.raises(UsageError, match="the index has no part 1: it has 1, counted from 0"):
        make_index_parts(context, samples, features, head, [1])
    assert make_index_parts(context, samples, features, head, [0]) == 1
    assert list(root.glob("indexes/*/building/part-00000.faiss"))
    built = build_search_index.fn(context, samples, features, head)
    record = read_index_record(built.artifact.path)
    assert record.kind == index.kind and record.nprobe and record.k_factor and record.recall_queries == 50
    assert not list(root.glob("indexes/*/building"))
    assert {path: path.stat().st_mtime_ns for path in root.glob("vectors/*/*.parquet")} == before
    assert read_index(built.artifact.path / "index.faiss").ntotal == SAMPLES
    left = build_search_index.fn(context, samples, features, head, removed=[2, 5])
    ids = tables.read(left.artifact.path / "ids.parquet", tables.INDEX_IDS)["train_id"].to_pylist()
    assert ids == [number for number in range(SAMPLES) if number not in (2, 5)]
    (vectors,) = before
    _, found = open_search_index(left.artifact.path).search(read_vectors(vectors).vectors[[2, 5]], SAMPLES)
    assert not np.isin(found, [2, 5]).any()
