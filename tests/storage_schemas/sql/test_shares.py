"""Shares in SQL against the same sums in NumPy."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fastgda_core.evaluation import shares as core
from storage_schemas import tables
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.publishing.takedown import lift, take_down
from storage_schemas.runs.records import Labelling
from storage_schemas.snapshots.published import read_published
from storage_schemas.sql import shares
from storage_schemas.sql.filters import SampleFilters
from storage_schemas.sql.shares import (
    UNKNOWN,
    QuerySums,
    UnknownColumn,
    UnknownQuery,
    measured,
    number_payees,
    payee_columns,
    queries_scored,
    query_sums,
    shared_queries,
)
from storage_schemas.sql.views import connect, query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import plan_run, publish_run, shard_key, show, write_table

SAMPLES, QUERIES = 9, ("q0", "q1", "q2", "q3")
TARS = ["a.tar"] * 4 + ["b.tar"] * 3 + ["c.tar"] * 2
GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(1, 2, size=(len(QUERIES), SAMPLES))
ERRORS = GENERATOR.uniform(0.1, 2, size=SCORES.shape).astype(np.float32).astype(np.float64)
ERRORS[2, 5] = np.nan  # a pair whose error is not known


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four queries, nine samples in three tars; tests only read it."""
    folder = tmp_path_factory.mktemp("shares") / "workspace"
    workspace = Workspace(folder)
    record = plan_run(folder, queries=QUERIES, samples=SAMPLES)
    for number, name in enumerate(QUERIES):
        rows = [
            {
                "query_id": name,
                "train_id": train,
                "score": score,
                "standard_error": None if math.isnan(error) else error,
            }
            for train, (score, error) in enumerate(zip(SCORES[number].tolist(), ERRORS[number].tolist(), strict=True))
        ]
        write_table(workspace.score_shard(record.run, number), tables.SCORES, rows, shard_key(record.run, number))
    publish_runs(workspace, [record.run])
    assert record.samples is not None
    before = tables.read(workspace.file(record.samples), tables.SAMPLES).to_pylist()
    rows = [{**row, "shard": tar} for row, tar in zip(before, TARS, strict=True)]
    show(workspace, samples=workspace.relative(write_table(workspace.samples("tars"), tables.SAMPLES, rows)))
    return folder


def expected(number: int, payee: list[str]) -> dict[str, tuple[float, float, float]]:
    """(share, standard error, uniform) by payee of one query, from the core."""
    names = sorted(set(payee))
    numbers = np.array([names.index(each) for each in payee])
    found = core.query_shares(core.sums_of(SCORES[number], ERRORS[number], numbers))
    return dict(zip(names, zip(found.share, found.standard_error, found.uniform, strict=True), strict=True))


def assert_rows(rows: list[dict[str, object]], payee: list[str]) -> None:
    wanted = {(name, who): each for place, name in enumerate(QUERIES) for who, each in expected(place, payee).items()}
    assert {(row["query_id"], row["payee"]) for row in rows} == wanted.keys()
    for row in rows:
        share, error, uniform = wanted[str(row["query_id"]), str(row["payee"])]
        assert math.isclose(row["share"], share) and math.isclose(row["uniform"], uniform)  # type: ignore[arg-type]
        assert (row["standard_error"] is None) == math.isnan(error) == (row["query_id"] == "q2")
        assert row["standard_error"] is None or math.isclose(row["standard_error"], error)  # type: ignore[arg-type]


def test_the_view_has_the_shares_of_tars_and_the_macro_those_of_any_expression(root: Path) -> None:
    assert_rows(query(root, "FROM shares").to_pylist(), TARS)
    parity = "shares_by(CASE WHEN train_id % 2 = 0 THEN 'even' END)"
    assert_rows(query(root, f"FROM {parity}").to_pylist(), ["even" if each % 2 == 0 else UNKNOWN for each in range(9)])
    everything = query(root, "SELECT query_id, sum(share) AS share FROM shares GROUP BY query_id")
    assert np.allclose(everything["share"].to_numpy(), 1)


def sums(root: Path, by: str, agreement: float | None = None) -> list[QuerySums]:
    with connect(root) as connection:
        number_payees(connection, by)
        return list(query_sums(connection, shared_queries(connection), agreement))


@pytest.mark.parametrize("rows", [1, 2 * SAMPLES, 10**6])
def test_sums_of_queries_are_numpys_whatever_is_read_at_a_time(
    root: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "BLOCK_ROWS", rows)
    found = sums(root, "shard")
    assert [each.query_id for each in found] == list(QUERIES)
    for number, each in enumerate(found):
        wanted = core.sums_of(SCORES[number], ERRORS[number], np.array([0] * 4 + [1] * 3 + [2] * 2))
        for name in ("payee", "samples", "influence", "variance", "noise"):
            assert np.allclose(getattr(each, name), getattr(wanted, name), equal_nan=True), name
        assert each.measured.sum() == SAMPLES - (number == 2)


def test_scores_without_an_error_get_one_from_the_agreement_with_another_teacher(root: Path) -> None:
    found, error = sums(root, "shard", 0.75)[2], ERRORS[2].copy()
    error[5] = SCORES[2].std() / 2  # the share 1 - r of the variance
    wanted = core.sums_of(SCORES[2], error, np.array([0] * 4 + [1] * 3 + [2] * 2))
    assert np.allclose(found.variance, wanted.variance) and np.allclose(found.noise, wanted.noise)


def test_payees_are_any_column_that_holds_one_value(root: Path) -> None:
    with connect(root) as connection:
        payees = number_payees(connection, "shard")
        assert payees.names == ["a.tar", "b.tar", "c.tar", UNKNOWN] and payees.samples.tolist() == [4, 3, 2, 0]
        assert number_payees(connection, "width").names == ["8", UNKNOWN]
        assert {"shard", "key", "width"} <= set(payee_columns(connection)) and "captions" not in payee_columns(
            connection
        )
        for wrong in ("captions", "artist", 'a"; DROP', "a/b~'c"):
            with pytest.raises(UnknownColumn, match="take one of train_id, key, shard"):
                number_payees(connection, wrong)


def test_samples_that_no_table_has_are_unknown(root: Path, tmp_path: Path) -> None:
    publish_run(tmp_path, queries=("q0",))
    show(Workspace(tmp_path), samples=None)
    (row,) = query(tmp_path, "FROM shares").to_pylist()
    assert row["payee"] == UNKNOWN and row["share"] == 1
    (found,) = sums(tmp_path, "shard")
    assert found.payee.tolist() == [0] and found.samples.tolist() == [4]


def test_negative_influence_pays_nobody_whatever_it_means_for_ranks(tmp_path: Path) -> None:
    for run, negatives in (("keep", "keep"), ("tie", "tie")):
        folder = tmp_path / run
        record = plan_run(folder, run, queries=("q0",), samples=3)
        rows: list[dict[str, object]] = [
            {"query_id": "q0", "train_id": train, "score": score} for train, score in enumerate([-5.0, 1.0, 3.0])
        ]
        write_table(Workspace(folder).score_shard(run, 0), tables.SCORES, rows, shard_key(run, 0))
        Workspace(folder).labelling(run).write_text(Labelling(negatives=negatives).model_dump_json())  # type: ignore[arg-type]
        publish_runs(Workspace(folder), [record.run])
        found = query(folder, "SELECT payee, share FROM shares_by(train_id) ORDER BY payee").to_pylist()
        assert [row["share"] for row in found] == [0.0, 0.25, 0.75]


def test_queries_are_chosen_by_name_split_and_the_time_of_their_run(root: Path, tmp_path: Path) -> None:
    publish_run(tmp_path, "early", queries=("a", "b"))
    plan = plan_run(tmp_path, "late", queries=("b", "c"))
    assert plan.created_at == datetime(2026, 1, 1, tzinfo=UTC)
    workspace = Workspace(tmp_path)
    assert queries_scored(workspace, plan.created_at, None) == ["a", "b"]
    assert queries_scored(workspace, None, plan.created_at) == []
    with connect(root) as connection:
        assert shared_queries(connection) == dict.fromkeys(QUERIES, SAMPLES)
        assert list(shared_queries(connection, ["q3", "q1"])) == ["q1", "q3"]
        assert list(shared_queries(connection, split="test")) == list(QUERIES)
        with pytest.raises(UnknownQuery, match="'nobody' is no query with published scores"):
            shared_queries(connection, ["q1", "nobody"])
        with pytest.raises(UnknownQuery, match="no published query is of split 'tset': there are test"):
            shared_queries(connection, split="tset")
        assert measured(connection, "spearman", "another teacher") is None


def test_a_sample_that_is_taken_down_has_no_share_until_that_is_lifted(tmp_path: Path) -> None:
    publish_run(tmp_path, queries=("q0",))
    workspace, ask = Workspace(tmp_path), "SELECT payee, share, influence FROM shares_by(train_id) ORDER BY payee"
    before = query(tmp_path, ask).to_pylist()
    assert [row["share"] for row in before] == [0, 1 / 3, 2 / 3, 0]
    distinct_images(workspace)
    take_down(workspace, [2], reason="asked for", by="test")
    after = query(tmp_path, ask).to_pylist()
    assert [row["payee"] for row in after] == ["0", "1", "3"] and [row["share"] for row in after] == [0, 1, 0]
    assert after[1]["influence"] == before[1]["influence"]
    (found,) = sums(tmp_path, "train_id")
    assert found.samples.sum() == 3
    lift(workspace, 1, reason="a mistake", by="test")
    assert query(tmp_path, ask).to_pylist() == before


def distinct_images(workspace: Workspace) -> None:
    """Give every sample bytes of its own: a take-down is of all samples with the same bytes."""
    samples = read_published(workspace).samples
    assert samples is not None
    rows = tables.read(workspace.file(samples), tables.SAMPLES).to_pylist()
    rows = [{**row, "image_sha256": f"{row['train_id']:064d}"} for row in rows]
    show(workspace, samples=workspace.relative(write_table(workspace.samples("distinct"), tables.SAMPLES, rows)))


def test_fields_of_the_metadata_name_payees_and_samples_without_one_are_unknown(tmp_path: Path) -> None:
    publish_run(tmp_path, queries=("q0",))
    workspace = Workspace(tmp_path)
    samples = read_published(workspace).samples
    assert samples is not None
    rows = tables.read(workspace.file(samples), tables.SAMPLES).to_pylist()
    told = [
        '{"creator": "Ada", "a/b": 1, "year": 2000, "Width": "wide"}',
        '{"creator": "Ada"}',
        '{"creator": "Bob \\u00e9"}',
        "{}",
    ]
    rows = [{**row, "metadata": text} for row, text in zip(rows, told, strict=True)]
    show(workspace, samples=workspace.relative(write_table(workspace.samples("told"), tables.SAMPLES, rows)))
    with connect(tmp_path) as connection:
        payees = number_payees(connection, "creator")
        assert payees.names == ["Ada", "Bob \u00e9", UNKNOWN] and payees.samples.tolist() == [2, 1, 1]
        assert number_payees(connection, "a/b").names == ["1", UNKNOWN]
        assert number_payees(connection, "SHARD").names == number_payees(connection, "shard").names
        columns = payee_columns(connection)
        assert (columns["creator"], columns["year"], columns["a/b"]) == ("VARCHAR", "BIGINT", "VARCHAR")
        assert not {"image_look", "metadata", "Width"} & set(columns), "width is a column, in upper case as well"
        filters = SampleFilters(tables.read(workspace.file(read_published(workspace).samples or ""), tables.SAMPLES))
        known = {column.name: column.type for column in filters.columns if column.name in columns}
        assert known == {name: columns[name] for name in known} and {"creator", "year", "width"} <= set(known)
        for name in ("Width", "width"):
            assert number_payees(connection, name).names == ["8", UNKNOWN]
            assert filters.bitmap(f'"{name}" = 8').all()
    (found,) = sums(tmp_path, "creator")
    assert found.payee.tolist() == [0, 1, 2] and found.influence.tolist() == [1, 2, 0]
    by_sql = query(tmp_path, "SELECT payee, share FROM shares_by(metadata->>'creator') ORDER BY payee").to_pylist()
    assert [(row["payee"], row["share"]) for row in by_sql] == [("Ada", 1 / 3), ("Bob \u00e9", 2 / 3), (UNKNOWN, 0)]
