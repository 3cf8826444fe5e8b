"""Standard errors of scores from shards to ranks, through the queries of docs/sql.md."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pyarrow as pa

from storage_schemas import tables
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import first_version, plan_run, shard_key, write_table

DOCUMENT = Path(__file__).parents[3] / "docs" / "sql.md"
SCORES = [5.0, 4.0, 3.9, 0.0]
ERRORS = [0.1, 0.3, 0.01, 0.2]


def documented(column: str) -> str:
    """The one query of the document that names a column so."""
    (statement,) = re.findall(rf'fastgda sql "([^"]* AS {column} [^"]*)"', DOCUMENT.read_text(encoding="utf-8"))
    return str(statement)


def test_errors_reach_the_ranks_and_a_shard_of_an_earlier_release_has_none(tmp_path: Path) -> None:
    plan_run(tmp_path, queries=("new", "old"))
    rows = [{"train_id": train, "score": score} for train, score in enumerate(SCORES)]
    new = [{"query_id": "new", **row, "standard_error": error} for row, error in zip(rows, ERRORS, strict=True)]
    for shard, (table, given) in enumerate(
        [(tables.SCORES, new), (first_version(tables.SCORES), [{"query_id": "old", **row} for row in rows])]
    ):
        write_table(Workspace(tmp_path).score_shard("run-1", shard), table, given, shard_key("run-1", shard))
    publish_runs(Workspace(tmp_path), ["run-1"])
    found = query(tmp_path, "SELECT query_id, standard_error FROM ranks ORDER BY query_id, rank")
    assert found.schema.field("standard_error").type == pa.float32()
    expected = [*pa.array(ERRORS, pa.float32()).to_pylist(), None, None, None, None]
    assert found["standard_error"].to_pylist() == expected

    mean = sum(SCORES) / 4
    variance = sum((score - mean) ** 2 for score in SCORES) / 3
    noise = {row["query_id"]: row["noise"] for row in query(tmp_path, documented("noise")).to_pylist()}
    assert noise["old"] is None
    assert math.isclose(noise["new"], sum(error**2 for error in ERRORS) / 4 / variance, rel_tol=1e-5)
    # 1 > 2 x 0.32, 0.1 < 2 x 0.3, 3.9 > 2 x 0.2, and the last has no next.
    sure = {row["query_id"]: row["sure"] for row in query(tmp_path, documented("sure")).to_pylist()}
    assert sure["old"] is None and math.isclose(sure["new"], 2 / 3)
