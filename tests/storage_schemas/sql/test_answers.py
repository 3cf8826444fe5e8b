"""An answer as first rows, a number, CSV, JSON and Parquet, against Python's own readers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from storage_schemas.sql.answers import Answer

QUERY = """
SELECT number AS id, caption, 'b' AS "a", 'c' AS "a", number / 3.0 AS share,
    [number, 2] AS several, '\\x01'::BLOB AS raw
FROM (VALUES (1, 'a, "cat"'), (2, NULL), (3, E'two\\nlines'), (4, '')) AS t(number, caption) ORDER BY number DESC
"""


def answer(query: str) -> Answer:
    connection = duckdb.connect()
    (statement,) = connection.extract_statements(query)
    return Answer(connection, statement, connection.sql(query))


def whole(pieces) -> str:
    return b"".join(bytes(piece) for piece in pieces).decode()


def test_columns_of_one_name_are_told_apart_and_rows_counted() -> None:
    found = answer(QUERY)
    assert found.columns == ["id", "caption", "a", "a_1", "share", "several", "raw"]
    assert found.count(60) == 4 and not found.is_plan
    assert found.first(1) == [("4", "", "b", "c", str(4 / 3), "[4,2]", "<1 bytes>")]
    assert answer("EXPLAIN SELECT 1").is_plan
    assert answer(QUERY).table()["id"].to_pylist() == [4, 3, 2, 1]


def test_csv_and_json_are_read_back_as_they_were() -> None:
    rows = list(csv.reader(io.StringIO(whole(answer(QUERY).csv()), newline="")))
    assert rows[0] == answer(QUERY).columns
    assert [row[1] for row in rows[1:]] == ["", "two\nlines", "", 'a, "cat"']
    objects = json.loads(whole(answer(QUERY).json()))
    assert [each["caption"] for each in objects] == ["", "two\nlines", None, 'a, "cat"']
    assert objects[0]["several"] == [4, 2] and objects[1]["share"] == pytest.approx(1.0)
    assert len(json.loads(whole(answer(QUERY).json(limit=2)))) == 2
    assert json.loads(whole(answer("SELECT 1 AS a WHERE false").json())) == []
    assert json.loads(whole(answer("SELECT 'nan'::DOUBLE AS a").json())) == [{"a": None}]
    assert whole(answer('SELECT NULL AS "a,b"').csv()) == '"a,b"\n""\n', "an empty line would be no row"


def test_parquet_has_every_row_in_order(tmp_path: Path) -> None:
    answer("SELECT range AS a, 'x' AS a FROM range(300000)").write_parquet(tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["a", "a_1"] and table["a"].to_pylist() == list(range(300_000))
    answer("SELECT 1 AS a WHERE false").write_parquet(tmp_path / "b.parquet", limit=3)
    assert pq.read_table(tmp_path / "b.parquet").num_rows == 0


def test_an_error_within_a_query_says_nothing_of_our_own_sql() -> None:
    with pytest.raises(duckdb.Error) as caught:
        whole(answer("SELECT CAST(caption AS INTEGER) AS a FROM (VALUES ('x')) AS t(caption)").csv())
    assert "LINE" not in str(caught.value)
    assert answer("PRAGMA version").count(60) == 1, "a query that cannot be taken apart is counted as it is"
