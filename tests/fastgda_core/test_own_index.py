"""Neighbours by an index of one's own: the right ones, of any kind, without a copy of it in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from fastgda_core.search.own_index import exact_rows, open_own_index

ROWS, WIDTH, K = 3000, 16, 40


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    made = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def written(path: Path, vectors: NDArray[np.float32], kind: str, metric: int = faiss.METRIC_INNER_PRODUCT) -> Path:
    index = faiss.index_factory(WIDTH, kind, metric)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


def queries(count: int = 21) -> NDArray[np.float32]:
    return 3 * np.random.default_rng(1).normal(size=(count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("kind", ["Flat", "IVF32,Flat", "IVF32_HNSW8,Flat", "RR16,IVF32_HNSW8,SQfp16", "HNSW16"])
def test_what_looks_at_enough_of_an_index_finds_the_nearest(
    tmp_path: Path, vectors: NDArray[np.float32], kind: str
) -> None:
    index = open_own_index(written(tmp_path / "image.index", vectors, kind), nprobe=32)
    similarity, rows = index.nearest(queries(), K)
    unit = queries() / np.linalg.norm(queries(), axis=1, keepdims=True)
    cosines = unit.astype(np.float64) @ vectors.T.astype(np.float64)
    truth = np.argsort(-cosines, axis=1)[:, :K]
    shared = [len(np.intersect1d(mine, true)) for mine, true in zip(rows, truth, strict=True)]
    assert np.mean(shared) >= (0.99 if "SQ" in kind or "HNSW16" in kind else 1.0) * K
    np.testing.assert_allclose(similarity, np.take_along_axis(cosines, rows, 1), atol=2e-3)
    assert (np.diff(similarity, axis=1) <= 0).all()


def test_distances_are_of_vectors_as_the_encoder_gives_them(tmp_path: Path, vectors: NDArray[np.float32]) -> None:
    longer = vectors * np.linspace(0.5, 3, ROWS, dtype=np.float32)[:, None]
    index = open_own_index(written(tmp_path / "image.index", longer, "IVF32,Flat", faiss.METRIC_L2), nprobe=32)
    similarity, rows = index.nearest(queries(), K)
    squares = ((queries()[:, None].astype(np.float64) - longer) ** 2).sum(2)
    np.testing.assert_array_equal(rows, np.argsort(squares, axis=1)[:, :K])
    np.testing.assert_allclose(-similarity, np.sort(squares, axis=1)[:, :K], rtol=1e-4)


@pytest.mark.parametrize("cosine", [True, False])
def test_brute_force_over_blocks_is_that_over_all(vectors: NDArray[np.float32], cosine: bool) -> None:
    longer = vectors * np.linspace(0.5, 3, ROWS, dtype=np.float32)[:, None]
    found = exact_rows(np.array_split(longer, 7), queries(), K, cosine=cosine)
    near = queries() @ longer.T if cosine else -((queries()[:, None] - longer) ** 2).sum(2)
    truth = np.argsort(-near, axis=1)[:, :K]
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(truth, axis=1))


def test_lists_that_are_looked_at_hold_many_times_what_is_asked_for(
    tmp_path: Path, vectors: NDArray[np.float32]
) -> None:
    path = written(tmp_path / "image.index", vectors, "IVF300,Flat")
    assert open_own_index(path, None).lists(10) == (64, 300)  # the least
    assert open_own_index(path, None).lists(60) == (96, 300)  # 16 x 60 rows of 10 a list
    assert open_own_index(path, None).lists(1000) == (300, 300)
    assert open_own_index(path, 7).lists(1000) == (7, 300)


def test_an_empty_or_broken_index_is_refused(tmp_path: Path, vectors: NDArray[np.float32]) -> None:
    faiss.write_index(faiss.IndexFlatIP(4), str(tmp_path / "empty.index"))
    with pytest.raises(UsageError, match="is an empty index"):
        open_own_index(tmp_path / "empty.index", None)
    whole = written(tmp_path / "image.index", vectors, "IVF32,Flat").read_bytes()
    (tmp_path / "image.index").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="is no whole index"):
        open_own_index(tmp_path / "image.index", None)


MEASURE = """
import sys
from pathlib import Path
from fastgda_core.search.own_index import open_own_index
import numpy as np

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

before = held()
index = open_own_index(Path(sys.argv[1]), nprobe=2)
index.nearest(np.ones((1, index.width), np.float32), 10)
print(held() - before)
"""


def test_an_index_is_mapped_and_not_read(tmp_path: Path) -> None:
    many = np.random.default_rng(2).normal(size=(40_000, 256)).astype(np.float32)
    index = faiss.index_factory(256, "IVF64,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(many[:4000])
    index.add(many)
    faiss.write_index(index, str(tmp_path / "image.index"))
    megabytes = (tmp_path / "image.index").stat().st_size / 2**20
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "image.index")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert megabytes > 38 and float(done.stdout) < megabytes / 4
