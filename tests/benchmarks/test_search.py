from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search import (
    Clusters,
    K,
    approximate_rows,
    build_large,
    exact_rows,
    first_answer,
    print_paper,
    write_parts,
)
from fastgda_core.search.recall import exact_neighbours

ROWS, WIDTH = 1500, 32


def test_clusters_are_the_same_each_time_and_of_length_one() -> None:
    blocks = [np.concatenate([block.vectors for block in Clusters(ROWS, WIDTH).blocks()]) for _ in range(2)]
    assert np.array_equal(*blocks) and blocks[0].shape == (ROWS, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(blocks[0], axis=1), 1, rtol=1e-5)


@pytest.mark.integration
def test_every_row_of_the_small_table_finds_what_it_says() -> None:
    clusters = Clusters(ROWS, WIDTH)
    vectors = next(clusters.blocks()).vectors
    queries = clusters.draw(64, 2)
    truth = exact_neighbours(queries, [(np.arange(ROWS), vectors)], K)
    exact = exact_rows(vectors, queries, truth)
    assert [row.what for row in exact] == ["NumPy", "Flat", "SQfp16"]
    assert [row.recall for row in exact[:2]] == [1, 1] and exact[2].recall > 0.99
    rows = approximate_rows(vectors, queries, truth, clusters.draw(64, 1), 0.9)
    assert len(rows) == 5 and all(row.recall > 0.85 for row in rows if "not installed" not in row.what)


@pytest.mark.integration
def test_the_large_index_is_built_from_parts_measured_and_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parts(tmp_path, ROWS, WIDTH, "", 0.9)
    found = build_large(tmp_path, ROWS, WIDTH, "IVF32,RaBitQ6", 0.9)
    assert found["recall_at_100"] > 0.85 and 0 < found["seconds"] < 60 and found["settings"]["nprobe"] >= 1
    assert 0 < first_answer(tmp_path, ROWS, WIDTH, "IVF32,RaBitQ6", 0.9)["seconds"] < 5
    print_paper(found, argparse.Namespace(threads=1, large=ROWS, width=WIDTH))
    assert "400,000,000" in capsys.readouterr().out
