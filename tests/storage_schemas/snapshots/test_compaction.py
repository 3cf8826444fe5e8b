from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storage_schemas import tables
from storage_schemas.commit import commit_table, input_key
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.ledger import read_compaction, write_labelling, write_plan
from storage_schemas.runs.records import Labelling, Part, RunRecord
from storage_schemas.snapshots.compaction import RunUnfinished, _Group, _in_order, compact
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql.views import connect, query
from storage_schemas.table import DamagedTable
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import commit_shard, finish_run, plan_run, publish_run

Scores = dict[str, dict[int, float]]  # by query_id and train_id
RUN = "run"


def scored(root: Path, scores: Scores, splits: int) -> Workspace:
    """A run whose queries stand in one block, their candidates cut into `splits` shards."""
    workspace = Workspace(root)
    by_shard: list[list[dict[str, object]]] = [[] for _ in range(splits)]
    for query_id, mine in scores.items():
        for train_id, score in mine.items():
            by_shard[train_id % splits].append({"query_id": query_id, "train_id": train_id, "score": score})
    record = RunRecord(
        run=RUN,
        name="n",
        teacher="t",
        created_at=datetime.now(UTC),
        shards=splits,
        pairs=sum(map(len, scores.values())),
        config={},
    )
    keys = [input_key(number) for number in range(splits)]
    write_plan(
        workspace,
        record,
        tables.PLAN_SHARDS.rows(
            shard=range(splits), input_key=keys, query_block=[0] * splits, pairs=[len(rows) for rows in by_shard]
        ),
        tables.PLAN_QUERIES.rows(
            query_id=list(scores), query_block=[0] * len(scores), pairs=[len(mine) for mine in scores.values()]
        ),
    )
    for number, rows in enumerate(by_shard):
        table = tables.pa.Table.from_pylist(rows, schema=tables.SCORES.schema)
        path = workspace.score_shard(RUN, number)
        commit_table(path, table, tables.SCORES, key=keys[number], started=time.monotonic())
    return workspace


def ranked(scores: Scores) -> list[tuple[str, int, float, int, float]]:
    """Every row with its rank and rank label, by plain sorting: highest first, ties by train_id."""
    rows = []
    for query_id in sorted(scores, key=str.encode):
        mine = scores[query_id]
        for place, train_id in enumerate(sorted(mine, key=lambda train, mine=mine: (-mine[train], train)), start=1):
            rows.append((query_id, train_id, mine[train_id], place, float(np.float32(place / len(mine)))))
    return rows


def tied(scores: Scores) -> list[tuple[str, int, float, int, float]]:
    """The same where negatives are tied: what is not above 0 has the last rank, the order of the rows is the same."""
    return [
        row if row[2] > 0 else (*row[:3], len(scores[row[0]]), 1.0)  # type: ignore[misc]
        for row in ranked(scores)
    ]


def rows_of(workspace: Workspace, parts: list[Part]) -> list[tuple[object, ...]]:
    """The rows of the parts as they lie in the files."""
    found: list[tuple[object, ...]] = []
    for part in parts:
        table = pq.read_table(workspace.root / part.path, partitioning=None)
        assert table.num_rows == part.rows
        names = ("query_id", "train_id", "score", "rank", "rank_label")
        found += [tuple(row[name] for name in names) for row in table.to_pylist()]
    return found


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, -1e308]),
    st.floats(allow_nan=False, allow_infinity=False),
)
SCORES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
    st.dictionaries(st.integers(0, 2**40), VALUES, min_size=1, max_size=12),
    min_size=1,
    max_size=6,
)


@pytest.mark.integration
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCORES, st.integers(1, 4), st.integers(1, 30))
@example({"q": {3: 0.0, 1: -0.0, 2: 0.0}, "p": {1: 1.0}}, 2, 2)
def test_ranks_are_those_of_plain_sorting(
    tmp_path_factory: pytest.TempPathFactory, scores: Scores, splits: int, part_rows: int
) -> None:
    workspace = scored(tmp_path_factory.mktemp("w"), scores, splits)
    parts = compact(workspace, RUN, part_rows=part_rows)
    assert rows_of(workspace, parts) == ranked(scores)
    assert all(part.queries == 1 or part.rows <= part_rows for part in parts)
    left_out = frozenset(sorted(scores)[:1])
    rest = {name: mine for name, mine in scores.items() if name not in left_out}
    assert rows_of(workspace, compact(workspace, RUN, without=left_out, part_rows=part_rows)) == ranked(rest)
    vacuum(workspace, older_than=timedelta(0))
    assert rows_of(workspace, compact(workspace, RUN, without=left_out, part_rows=part_rows)) == ranked(rest)


@pytest.mark.integration
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCORES, st.integers(1, 3), st.integers(1, 30))
@example(
    {"q": {3: 0.0, 1: -0.0, 2: 0.0, 4: 5e-324}, "p": {1: 1.0, 2: 2.0}, "r": {1: -1.0}, "s": {2: -2.0, 1: -1.0}}, 2, 2
)
def test_ranks_with_tied_negatives_are_those_of_plain_sorting(
    tmp_path_factory: pytest.TempPathFactory, scores: Scores, splits: int, part_rows: int
) -> None:
    workspace = scored(tmp_path_factory.mktemp("w"), scores, splits)
    kept = compact(workspace, RUN, part_rows=part_rows)
    write_labelling(workspace, RUN, Labelling(negatives="tie"))
    parts = compact(workspace, RUN, part_rows=part_rows)
    assert rows_of(workspace, parts) == tied(scores)
    assert not {part.path for part in parts} & {part.path for part in kept}
    write_labelling(workspace, RUN, Labelling())
    assert compact(workspace, RUN, part_rows=part_rows) == kept


def test_shards_with_other_rows_than_planned_are_noticed_where_all_rows_are_tied(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path, samples=4)
    for number, (name, samples) in enumerate((("q0", 3), ("q1", 5), ("q2", 4))):
        commit_shard(tmp_path, "run-1", number, name, samples, shift=-9.0)
    write_labelling(workspace, "run-1", Labelling(negatives="tie"))
    with pytest.raises(RunUnfinished, match="do not hold the planned number of candidates of each query"):
        compact(workspace, "run-1")
    assert not list(tmp_path.rglob("ranks/*/*.parquet"))


@pytest.mark.parametrize(
    ("scores", "ranks", "right"),
    [
        ([3.0, 1.0, -1.0, -2.0, 0.0, 0.0], [1, 2, 4, 4, 2, 2], True),
        ([1.0, 3.0, -1.0, -2.0, 0.0, 0.0], [1, 2, 4, 4, 2, 2], False),  # out of order among those above 0
        ([3.0, 1.0, -2.0, -1.0, 0.0, 0.0], [1, 2, 4, 4, 2, 2], False),  # and among the ties
        ([3.0, -1.0, 1.0, -2.0, 0.0, 0.0], [1, 4, 2, 4, 2, 2], False),
        ([3.0, 1.0, -1.0, -2.0, 0.0, 0.0], [1, 2, 3, 4, 2, 2], False),  # not tied
        ([3.0, 1.0, -1.0, 0.0, 0.0, -2.0], [1, 2, 4, 2, 2, 4], False),  # a row of the other query
    ],
)
def test_a_part_with_ties_that_was_written_out_of_order_is_noticed(
    scores: list[float], ranks: list[int], right: bool
) -> None:
    group = _Group(0, [("q0", 0, 4), ("q1", 0, 2)])
    assert _in_order(np.array(scores), np.array(ranks, np.int32), group, "tie") == right


def test_compacting_again_makes_nothing_anew(tmp_path: Path) -> None:
    finish_run(tmp_path)
    workspace = Workspace(tmp_path)
    parts = compact(workspace, "run-1")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert compact(workspace, "run-1") == parts
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_an_unfinished_run_is_not_compacted(tmp_path: Path) -> None:
    plan_run(tmp_path)
    commit_shard(tmp_path, "run-1", 0, "q0")
    with pytest.raises(
        RunUnfinished, match=r"2 of 3 score shards are not done \(first: 1\): `fastgda retry run-1 --workspace "
    ):
        compact(Workspace(tmp_path), "run-1")
    assert read_compaction(Workspace(tmp_path), "run-1") is None


def test_shards_that_hold_other_rows_than_planned_are_not_compacted(tmp_path: Path) -> None:
    plan_run(tmp_path, samples=4)
    for number, name in enumerate(("q0", "q1", "q2")):
        commit_shard(tmp_path, "run-1", number, name, samples=4 if number else 3)
    with pytest.raises(RunUnfinished, match="would hold 11 rows, its plan says 12"):
        compact(Workspace(tmp_path), "run-1")
    assert not list(tmp_path.rglob("ranks/*/*.parquet"))


@pytest.mark.heavy
def test_a_shard_with_a_flipped_bit_is_never_ranked(tmp_path: Path) -> None:
    """Most places are in no checksum that DuckDB looks at: its scores were other ones, and nobody was told."""
    finish_run(tmp_path, samples=400)
    workspace = Workspace(tmp_path)
    shard = workspace.score_shard("run-1", 0)
    content = shard.read_bytes()
    for place in range(4, len(content) - 8, 97):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedTable, match=r"part-00000\.parquet is damaged"):
            compact(workspace, "run-1")
    shard.write_bytes(content)
    assert compact(workspace, "run-1")


def test_vacuum_keeps_what_is_young_what_is_read_and_what_is_not_in_parts(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path)
    plan_run(tmp_path, "growing", queries=("q8", "q9"))
    commit_shard(tmp_path, "growing", 0, "q8")
    assert vacuum(workspace, older_than=timedelta(hours=1)) == []
    doomed = vacuum(workspace, older_than=timedelta(0), dry_run=True)
    assert [path.name for path in doomed] == [f"part-{number:05d}.parquet" for number in range(3)]
    assert all(isinstance(path, Path) and path.exists() for path in doomed)
    assert vacuum(workspace, older_than=timedelta(0)) == doomed
    assert not any(isinstance(path, Path) and path.exists() for path in doomed)
    assert workspace.score_shard("growing", 0).exists()
    statement = "SELECT run, state, count(*) AS n FROM shards GROUP BY ALL ORDER BY ALL"
    assert [tuple(row.values()) for row in query(tmp_path, statement).to_pylist()] == [
        ("growing", "done", 1),
        ("growing", "pending", 1),
        ("run-1", "done", 3),
    ]


def test_vacuum_deletes_no_shard_while_a_part_is_damaged(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    published = publish_run(tmp_path)
    (part,) = workspace.root.glob("ranks/*/part-*.parquet")
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(bytes(content))
    assert vacuum(workspace, older_than=timedelta(0)) == []
    assert all(workspace.score_shard(published.run, shard).exists() for shard in range(3))


@pytest.mark.heavy
def test_a_connection_goes_on_reading_the_snapshot_that_it_was_opened_on(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path)
    with connect(tmp_path) as before:
        finish_run(tmp_path, "run-2", queries=("q0",), shift=9.0)
        publish_runs(workspace, ["run-1", "run-2"])
        vacuum(workspace, older_than=timedelta(0))
        assert before.sql("SELECT max(score) FROM ranks").fetchall() == [(2.0,)]
    assert query(tmp_path, "SELECT max(score) AS m FROM ranks")["m"].to_pylist() == [11.0]
