"""The commands of docs/existing-index.md, in order, in a folder with an index of clip-retrieval and queries alone."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tasks.config.files import load_config
from tasks.reporting.finished import inputs_stamp
from tests import tiny
from tests.clip_folder import ORDER, ROWS, URL, embeddings, write_folder, write_shards
from tests.flows.pipeline_case import fastgda, lay_out

PAGE = Path(__file__).parents[2] / "docs" / "existing-index.md"
K, SCORED, RANDOM = 24, 16, 12
DEAD = 7  # of so many links one cannot be fetched


def documented() -> list[list[str]]:
    """The page's commands."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def fetch(listed: Path, shards: Path) -> list[int]:
    """Do what img2dataset does with a list, of which some links are dead; return the rows that came."""
    rows = pq.read_table(listed).to_pylist()
    for row in rows:
        number = int(ORDER[row["index_row"]])
        assert (row["url"], row["caption"]) == (URL.format(number), tiny.draw(number)[1])
        assert row["image_path"] == f"{row['index_row']:09d}"
    came = [row["index_row"] for row in rows if row["index_row"] % DEAD]
    write_shards(shards, came)
    return came


@pytest.mark.integration
def test_the_documented_way_from_an_index_to_a_run(
    tmp_path: Path, model_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "laion")
    tiny.write_tar(tmp_path / "queries" / "0.tar", tiny.sample_members(range(300, 308)))
    config = lay_out(
        tmp_path,
        model_folder,
        data={"shards": "shards/*.tar"},
        queries={"shards": "queries/*.tar", "split": {"train": 4, "validation": 2, "test": 2}, "twins": 0},
        candidates={
            **{"policy": "top_k", "k": K, "scored": SCORED, "space": "pixel", "index": {"folder": "laion"}},
            "check": {"queries": 2, "random": RANDOM},
        },
        features={"space": "pixel"},
        exact_check=None,
        self_consistency=None,
        head={"epochs": 1},
        expected={"samples": 60, "denoiser": "sd14"},
        evaluation={"cutoffs": [3, 5], "validation_cutoff": 5, "neighbors": 3, "gain_floor": None},
    )
    config.rename(tmp_path / "my_run.yaml")
    monkeypatch.chdir(tmp_path)
    (plan, listing), (after, run, sql, compare) = documented()[:2], documented()[2:]
    assert [each[1] for each in (plan, listing, after, run, sql, compare)] == [
        *("plan", "candidates", "candidates", "run", "sql", "candidates")
    ]

    said = fastgda(*plan[1:], home=home).stdout
    assert "refused" not in said and "no file matches" in said
    said = fastgda(*listing[1:], home=home).stdout
    assert "data.shards matches no file" in said
    wanted = pq.read_table("to_fetch.parquet")["index_row"].to_pylist()
    assert f"{8 * SCORED} pairs with 8 queries" in said and f"{len(wanted)} rows to fetch; 0 are there" in said
    nearest = np.argsort(-embeddings(range(300, 308)) @ embeddings(ORDER).T, axis=1)[:, : K + 2]
    assert len(set(wanted) - set(nearest.ravel().tolist())) <= RANDOM, "the others are the check's"
    assert len(wanted) < ROWS

    came = fetch(Path("to_fetch.parquet"), Path("shards/0.tar"))
    assert f"rows whose images are there: {len(came)} are in data.shards" in fastgda(*after[1:], home=home).stdout
    done = fastgda(*run[1:], home=home)
    assert "of 100" not in done.stdout and "candidate recall: " in done.stdout
    assert re.search(r"candidates: of \d+ rows that the index names for the queries \d\d\.\d% are there", done.stderr)
    rows = list(csv.DictReader(io.StringIO(fastgda(*sql[1:], "--format", "csv", home=home).stdout)))
    asked = [row for row in rows if row["query_id"].startswith("s03")]
    assert len(asked) == 8 and all(3 < int(row["candidates"]) <= SCORED for row in asked)
    assert all(int(row["farthest"]) <= K for row in rows)
    status = fastgda("status", "-c", "my_run.yaml", home=home).stdout
    assert "candidate recall " in status
    inputs = inputs_stamp(load_config(Path("my_run.yaml")))
    assert inputs == inputs_stamp(load_config(Path("my_run.yaml")))
    os.utime("laion/metadata/metadata_1.parquet", (0, 0))
    assert inputs != inputs_stamp(load_config(Path("my_run.yaml"))), "a run that is finished looks at it again"
    assert f"recall of the {K} nearest by brute force: 1.000 over 4 queries" in fastgda(*compare[1:], home=home).stdout
    again = fastgda(*listing[1:], home=home).stdout
    missing = pq.read_table("to_fetch.parquet")["index_row"].to_pylist()
    assert not set(missing) & set(came) and f"{len(missing)} rows to fetch" in again
