from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storage_schemas import tables
from storage_schemas.commit import commit_table
from storage_schemas.runs.ledger import done_shards, read_ledger
from storage_schemas.table import Table
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.teaching.families import family_of
from tasks.teaching.score_plan import ScoreRun, plan_scores, store_plan
from tests.tasks.configs import document

KEY = "0123456789abcdef"
SAMPLES = 12
TEACHERS = ("abu", "abu_plus", "abu_plus_first_order")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def write_stage(path: Path, table: Table, rows: list[dict[str, object]]) -> Artifact:
    commit_table(path, pa.Table.from_pylist(rows, schema=table.schema), table, key=KEY, started=time.monotonic())
    return Artifact(path.stem, KEY, path, len(rows))


def plan(
    root: Path, teacher: str, candidates: list[set[int]], shard_samples: int = 5, shard_queries: int | None = None
) -> tuple[Context, ScoreRun, list[str]]:
    """A plan of query number n against the training samples `candidates[n]`."""
    config = PipelineConfig.model_validate(
        document(
            workspace=str(root),
            teacher__name=teacher,
            teacher__shard_samples=shard_samples,
            teacher__shard_queries=shard_queries,
        )
    )
    context = Context(config, "model")
    # Not in alphabetical order, so that a plan must go by the table's.
    query_ids = [f"q{(number * 7 + 3) % 10}" for number in range(len(candidates))]
    image = png()
    queries = write_stage(
        context.workspace.queries(KEY),
        tables.QUERIES,
        [
            {"query_id": query, "split": "test", "caption": "teal", "image": image, "image_sha256": "0" * 64}
            for query in query_ids
        ],
    )
    pairs = [
        {"query_id": query, "train_id": train, "neighbor_rank": 1, "similarity": 0.5}
        for query, mine in zip(query_ids, candidates, strict=True)
        for train in sorted(mine, reverse=True)
    ]
    chosen = write_stage(context.workspace.candidates(KEY), tables.CANDIDATES, pairs)
    samples = Artifact("samples", KEY, context.workspace.samples(KEY), SAMPLES)
    family = family_of(context.config)
    run = plan_scores(chosen, queries, family.shard_shape(context.config, queries.rows))
    stages = {"samples": samples, "queries": queries, "candidates": chosen}
    store_plan(context, run, stages, "")
    return context, run, query_ids


def pairs_of_shards(run: ScoreRun) -> list[list[tuple[str, int]]]:
    """The pairs that each shard will score: its candidates among its queries x its samples."""
    return [
        [
            (run.query_ids[query], train)
            for query in shard.query_numbers
            for train in shard.train_ids[run.chosen(query, shard.train_ids)].tolist()
        ]
        for shard in run.shards
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("teacher", TEACHERS)
@settings(max_examples=25)
@given(
    candidates=st.lists(st.sets(st.integers(0, SAMPLES - 1), min_size=1), min_size=1, max_size=5),
    shard_samples=st.integers(1, SAMPLES + 1),
    shard_queries=st.none() | st.integers(1, 6),
)
def test_the_shards_of_a_plan_partition_its_pairs(
    tmp_path_factory: pytest.TempPathFactory,
    teacher: str,
    candidates: list[set[int]],
    shard_samples: int,
    shard_queries: int | None,
) -> None:
    _, run, query_ids = plan(tmp_path_factory.mktemp("plan"), teacher, candidates, shard_samples, shard_queries)
    asked = {(query, train) for query, mine in zip(query_ids, candidates, strict=True) for train in mine}
    of_shards = pairs_of_shards(run)
    occurrences = Counter(pair for pairs in of_shards for pair in pairs)
    assert set(occurrences) == asked
    assert set(occurrences.values()) == {1}
    assert run.pairs == len(asked)
    assert [run.pairs_of(shard) for shard in run.shards] == [len(pairs) for pairs in of_shards]
    assert all(of_shards)
    assert [shard.number for shard in run.shards] == list(range(len(run.shards)))
    assert len({run.shard_key(shard) for shard in run.shards}) == len(run.shards)


def test_the_exact_teacher_has_one_shard_per_query(tmp_path: Path) -> None:
    _, run, _ = plan(tmp_path, "abu_plus", [{1, 5}, {0}, {2, 3, 4}])
    assert [shard.query_numbers for shard in run.shards] == [[0], [1], [2]]
    assert [shard.train_ids.tolist() for shard in run.shards] == [[1, 5], [0], [2, 3, 4]]


def test_the_first_order_teacher_scores_blocks_of_samples_against_all_queries(tmp_path: Path) -> None:
    _, run, _ = plan(tmp_path, "abu_plus_first_order", [{1, 5, 7}, {1, 11}, {2, 3}], shard_samples=4)
    assert [shard.query_numbers for shard in run.shards] == [[0, 1, 2]] * 2
    assert [shard.train_ids.tolist() for shard in run.shards] == [[1, 2, 3, 5], [7, 11]]


def test_the_first_order_teacher_scores_blocks_of_queries_where_asked(tmp_path: Path) -> None:
    candidates = [{1, 5, 7}, {1, 11}, {2, 3}]
    _, run, _ = plan(tmp_path, "abu_plus_first_order", candidates, shard_samples=3, shard_queries=2)
    assert [(shard.query_numbers, shard.train_ids.tolist()) for shard in run.shards] == [
        ([0, 1], [1, 5, 7]),
        ([0, 1], [11]),
        ([2], [2, 3]),
    ]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_plan_made_twice_is_the_same(tmp_path: Path, teacher: str) -> None:
    candidates = [{1, 5}, {0, 3, 8}]
    _, once, _ = plan(tmp_path / "a", teacher, candidates)
    _, again, _ = plan(tmp_path / "b", teacher, candidates)
    assert all(map(np.array_equal, once.candidates, again.candidates))
    assert [once.shard_key(shard) for shard in once.shards] == [again.shard_key(shard) for shard in again.shards]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_only_shards_that_are_not_committed_are_missing(tmp_path: Path, teacher: str) -> None:
    context, run, _ = plan(tmp_path, teacher, [{1, 5}, {0, 3, 8}, {9}], shard_samples=2)
    numbers = set(range(len(run.shards)))
    assert done_shards(context.workspace, run.run) == set()
    done = run.shards[1]
    rows = [{"query_id": query, "train_id": train, "score": 0.5} for query, train in pairs_of_shards(run)[1]]
    path = part(context.workspace.scores(run.run), done.number)
    table = pa.Table.from_pylist(rows, schema=tables.SCORES.schema)
    commit_table(path, table, tables.SCORES, key=run.shard_key(done), started=time.monotonic())
    assert done_shards(context.workspace, run.run) == {1} < numbers
    path.write_bytes(path.read_bytes()[:-1])
    assert done_shards(context.workspace, run.run) == set()


def test_the_stored_plan_names_each_shard_and_the_rows_of_each_query(tmp_path: Path) -> None:
    candidates = [{1, 5}, {0, 3, 8}, {9}]
    context, run, query_ids = plan(tmp_path, "abu_plus_first_order", candidates, shard_samples=2, shard_queries=2)
    ledger = read_ledger(context.workspace, run.run).to_pylist()
    assert [row["pairs"] for row in ledger] == [len(pairs) for pairs in pairs_of_shards(run)]
    assert {row["state"] for row in ledger} == {"pending"}
    planned = tables.read(context.workspace.plan_queries(run.run), tables.PLAN_QUERIES).to_pylist()
    assert [(row["query_id"], row["pairs"]) for row in planned] == [
        (query_id, len(mine)) for query_id, mine in zip(query_ids, candidates, strict=True)
    ]
    shards = tables.read(context.workspace.plan_shards(run.run), tables.PLAN_SHARDS).to_pylist()
    block_of = {row["query_id"]: row["query_block"] for row in planned}
    for row, pairs in zip(shards, pairs_of_shards(run), strict=True):
        assert {block_of[query_id] for query_id, _ in pairs} == {row["query_block"]}
