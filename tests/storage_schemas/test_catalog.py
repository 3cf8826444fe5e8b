from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import tables
from storage_schemas.catalog import NotPublished, RefusedStatement, connect, publish, query, read_published, write_ranks
from storage_schemas.commit import manifest_path
from storage_schemas.workspace import Workspace, part
from tests.storage_schemas.workspaces import publish_run, write_table

ROOT = Path(__file__).parents[2]
VIEWS = ("samples", "rejected_samples", "queries", "candidates", "scores", "ranks", "exact_check", "metrics")


@pytest.fixture(scope="module")
def published_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three queries, four samples, metrics and checked pairs; tests only read it."""
    root = tmp_path_factory.mktemp("catalog") / "workspace"
    publish_run(root, extras=True)
    return root


def rows(root: Path, statement: str) -> list[tuple[object, ...]]:
    return list(zip(*(column.to_pylist() for column in query(root, statement).columns), strict=True))


def files_of(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("view", "count"),
    [
        ("samples", 4),
        ("rejected_samples", 0),
        ("queries", 3),
        ("candidates", 12),
        ("scores", 12),
        ("ranks", 12),
        ("exact_check", 2),
        ("metrics", 1),
        ("shards", 2),
    ],
)
def test_every_table_is_counted_by_sql(published_root: Path, view: str, count: int) -> None:
    assert rows(published_root, f"SELECT count(*) FROM {view}") == [(count,)]


def test_tables_are_joined_by_sql(published_root: Path) -> None:
    statement = """
        SELECT r.query_id, s.key, q.caption, r.score, s.captions[2]
        FROM ranks r JOIN samples s USING (train_id) JOIN queries q USING (query_id)
        WHERE r.rank = 1 ORDER BY r.query_id
    """
    best = [(f"q{number}", "s2", "a cat", 2.0, "a dog") for number in range(3)]
    assert rows(published_root, statement) == best


def test_a_run_without_metrics_has_empty_tables_in_their_place(tmp_path: Path) -> None:
    publish_run(tmp_path)
    for view in ("metrics", "exact_check"):
        assert rows(tmp_path, f"SELECT * FROM {view}") == []


@pytest.mark.parametrize("extras", [True, False])
def test_every_column_of_every_view_is_explained(tmp_path: Path, extras: bool) -> None:
    publish_run(tmp_path, extras=extras)
    columns = rows(tmp_path, "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE NOT internal")
    comments = {(table, column): comment for table, column, comment in columns}
    assert {table for table, _ in comments} == {*VIEWS, "shards"}
    unexplained = {place for place, comment in comments.items() if not comment and place[0] != "shards"}
    assert unexplained == set()


def test_an_absent_table_has_the_types_of_a_present_one(tmp_path: Path, published_root: Path) -> None:
    publish_run(tmp_path)
    statement = "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = 'metrics' ORDER BY column_index"
    assert rows(tmp_path, statement) == rows(published_root, statement)


def test_the_ledger_tells_a_missing_shard_from_a_finished_one(tmp_path: Path) -> None:
    published = publish_run(tmp_path)
    assert rows(tmp_path, "SELECT shard, state, device, rows FROM shards ORDER BY shard") == [
        (0, "done", "x", 6),
        (1, "done", "x", 6),
    ]
    manifest_path(tmp_path / published.shards[1].path).unlink()
    assert rows(tmp_path, "SELECT shard, state, rows FROM shards ORDER BY shard") == [
        (0, "done", 6),
        (1, "missing", 0),
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO shards VALUES ('r', 1, 'done', '', 0, 0)",
        "INSERT INTO shards VALUES ('r', 1, 'done', '', 0, 0) RETURNING run",
        "UPDATE shards SET rows = 0",
        "DELETE FROM shards",
        "TRUNCATE shards",
        "DROP TABLE shards",
        "DROP VIEW scores",
        "ALTER TABLE shards ADD COLUMN note VARCHAR",
        "CREATE TABLE other AS SELECT 1",
        "CREATE OR REPLACE VIEW scores AS SELECT 1",
        "CREATE MACRO one() AS 1",
        "COPY (SELECT 1) TO '{root}/copied.csv'",
        "COPY scores TO '{outside}/copied.parquet' (FORMAT parquet)",
        "COPY shards FROM '{root}/copied.csv'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{root}/copied.csv'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{root}/current.json'",
        "EXPLAIN ANALYZE DELETE FROM shards",
        "EXPORT DATABASE '{root}/dump'",
        "ATTACH '{root}/other.duckdb'",
        "ATTACH '{root}/catalog.duckdb' AS c",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA database_list",
        "PRAGMA enable_profiling",
        "SET enable_external_access = true",
        "SET threads = 1",
        "RESET lock_configuration",
        "CALL pragma_version()",
        "BEGIN",
        "CHECKPOINT",
        "VACUUM",
        "PREPARE p AS SELECT 1",
        "USE memory",
    ],
)
def test_what_is_no_query_is_refused(published_root: Path, tmp_path: Path, statement: str) -> None:
    root, outside = tmp_path / "workspace", tmp_path / "outside"
    shutil.copytree(published_root, root)
    outside.mkdir()
    before = files_of(tmp_path)
    with pytest.raises((RefusedStatement, duckdb.Error)) as refusal:
        query(root, statement.format(root=root, outside=outside))
    assert not isinstance(refusal.value, duckdb.ParserException)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("statement", ["", ";", "-- nothing", "SELECT 1; SELECT 2", "SELECT 1; DROP VIEW scores"])
def test_several_statements_or_none_are_refused(published_root: Path, statement: str) -> None:
    with pytest.raises(RefusedStatement, match="run one query at a time"):
        query(published_root, statement)


def test_one_query_may_end_with_a_semicolon(published_root: Path) -> None:
    assert rows(published_root, "SELECT 42;") == [(42,)]
    assert rows(published_root, "WITH s AS (SELECT 1 AS x) SELECT x FROM s") == [(1,)]


def test_a_wrong_query_is_an_error_of_the_database(published_root: Path) -> None:
    with pytest.raises(duckdb.Error, match="no_such_column"):
        query(published_root, "SELECT no_such_column FROM scores")


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM read_text('{root}/../secret.txt')",
        "SELECT * FROM read_text('{root}-twin/secret.txt')",
        "SELECT * FROM read_text('{root}/../*.txt')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM glob('{outside}/*')",
        "SELECT * FROM read_parquet('{outside}/secret.parquet')",
        "SELECT * FROM parquet_metadata('{outside}/secret.parquet')",
        "SELECT * FROM read_json('{outside}/secret.json')",
        "SELECT * FROM sniff_csv('{outside}/secret.txt')",
    ],
)
def test_files_outside_the_workspace_are_not_read(tmp_path: Path, statement: str) -> None:
    root = tmp_path / "workspace"
    publish_run(root)
    twin = tmp_path / "workspace-twin"
    twin.mkdir()
    for folder in (tmp_path, twin):
        (folder / "secret.txt").write_text("secret")
        (folder / "secret.json").write_text("{}")
    write_table(tmp_path / "secret.parquet", tables.INDEX_IDS, [{"train_id": 1}])
    with pytest.raises((duckdb.PermissionException, duckdb.CatalogException)):
        rows(root, statement.format(root=root, outside=tmp_path))


def test_files_inside_the_workspace_may_be_read(published_root: Path) -> None:
    statement = f"SELECT content FROM read_text('{published_root}/current.json')"
    assert json.loads(str(rows(published_root, statement)[0][0]))["run"] == "run-1"


def test_a_connection_cannot_be_unlocked(published_root: Path) -> None:
    connection = connect(published_root)
    for statement in ("SET lock_configuration = false", "SET enable_external_access = true"):
        with pytest.raises(duckdb.Error, match=r"locked|cannot|Cannot"):
            connection.execute(statement)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_published_run_says_how_to_make_one(tmp_path: Path, exists: bool) -> None:
    root = tmp_path / "workspace"
    if exists:
        root.mkdir()
    with pytest.raises(NotPublished, match="fastgda demo") as refusal:
        query(root, "SELECT 1")
    assert str(root) in str(refusal.value)


def test_the_published_run_is_the_latest_and_runs_are_kept(tmp_path: Path) -> None:
    first = publish_run(tmp_path, "run-1")
    second = publish_run(tmp_path, "run-2", samples=7)
    assert read_published(Workspace(tmp_path)) == second
    assert rows(tmp_path, "SELECT count(*) FROM scores") == [(21,)]
    publish(Workspace(tmp_path), first)
    publish(Workspace(tmp_path), first)
    assert rows(tmp_path, "SELECT count(*) FROM scores") == [(12,)]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run-1.json", "run-2.json"]


def test_the_catalog_file_answers_like_a_connection(published_root: Path) -> None:
    with duckdb.connect(str(published_root / "catalog.duckdb"), read_only=True) as catalog:
        for view in (*VIEWS, "shards"):
            statement = f"SELECT count(*) FROM {view}"
            assert catalog.execute(statement).fetchall() == rows(published_root, statement)
    assert not list(published_root.glob(".*"))


@pytest.mark.parametrize("name", ['it\'s a "work" space', "a; b -- c", "émoji 🎈", "brackets [ab] {x}"])
def test_a_workspace_with_an_awkward_path_works(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    publish_run(root, extras=True)
    assert rows(root, "SELECT count(*) FROM scores") == [(12,)]
    assert rows(root, "SELECT max(rank) FROM ranks") == [(4,)]
    with duckdb.connect(str(root / "catalog.duckdb"), read_only=True) as catalog:
        assert catalog.execute("SELECT count(*) FROM samples").fetchall() == [(4,)]


def test_a_workspace_given_by_a_relative_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish_run(Path("workspace"))
    assert rows(Path("workspace"), "SELECT count(*) FROM scores") == [(12,)]


def test_hostile_ids_and_captions_survive(tmp_path: Path) -> None:
    ids = ["'; DROP VIEW scores; --", 'a "b"\n\tc', "../../etc/passwd", "🎈", "%s {x} $1 \\", "nul \x00"]
    captions = ["'); DELETE FROM samples; --", "two\nlines 👩🏽‍🚀", "x" * 100_000]
    publish_run(tmp_path, queries=ids, captions=captions)
    assert {row[0] for row in rows(tmp_path, "SELECT DISTINCT query_id FROM ranks")} == set(ids)
    assert rows(tmp_path, "SELECT captions FROM samples LIMIT 1") == [(captions,)]
    assert rows(tmp_path, "SELECT DISTINCT caption FROM queries") == [(captions[0],)]


PAIRS = st.dictionaries(
    st.tuples(st.sampled_from(["q1", "q'2", "q 3"]), st.integers(0, 2**40)),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-300]) | st.floats(allow_nan=False),
    min_size=1,
    max_size=30,
)


@settings(max_examples=20, deadline=None)
@given(PAIRS, st.integers(1, 4))
def test_rank_labels_follow_the_scores(
    tmp_path_factory: pytest.TempPathFactory, pairs: dict[tuple[str, int], float], parts: int
) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    table: list[dict[str, object]] = [
        {"query_id": query_id, "train_id": train_id, "score": score} for (query_id, train_id), score in pairs.items()
    ]
    for number in range(parts):
        write_table(part(folder, number), tables.SCORES, table[number::parts])
    write_ranks(folder, folder / "ranks.parquet")
    expected = []
    for query_id in sorted({query_id for query_id, _ in pairs}):
        mine = [(train_id, score) for (owner, train_id), score in pairs.items() if owner == query_id]
        ids, values = np.array([train for train, _ in mine]), np.array([score for _, score in mine])
        for position, row in enumerate(np.lexsort((ids, -values)), start=1):
            expected.append((query_id, int(ids[row]), float(values[row]), position, np.float32(position / len(mine))))
    found = tables.read(folder / "ranks.parquet", tables.RANKS)
    assert [tuple(row.values()) for row in found.to_pylist()] == expected


def test_equal_scores_are_ranked_by_train_id(tmp_path: Path) -> None:
    table: list[dict[str, object]] = [{"query_id": "q", "train_id": n, "score": 1.0} for n in (9, 2, 5)]
    write_table(part(tmp_path, 0), tables.SCORES, table)
    write_ranks(tmp_path, tmp_path / "ranks.parquet")
    found: pa.Table = tables.read(tmp_path / "ranks.parquet", tables.RANKS)
    assert found["train_id"].to_pylist() == [2, 5, 9]
    assert found["rank"].to_pylist() == [1, 2, 3]


READER = """
import json, sys
from pathlib import Path
import duckdb
from storage_schemas.catalog import query

root, stop = Path(sys.argv[1]), Path(sys.argv[2])
counts, reads = set(), 0
while not stop.exists():
    counts.add(query(root, "SELECT count(*) AS n FROM scores")["n"][0].as_py())
    with duckdb.connect(str(root / "catalog.duckdb"), read_only=True) as catalog:
        counts.add(catalog.execute("SELECT count(*) FROM scores").fetchall()[0][0])
    reads += 1
    if reads == 1:
        print("reading", flush=True)
print(json.dumps({"counts": sorted(counts), "reads": reads}))
"""


def test_readers_never_fail_while_runs_are_published(tmp_path: Path) -> None:
    root, stop = tmp_path / "workspace", tmp_path / "stop"
    runs = [publish_run(root, "run-1"), publish_run(root, "run-2", samples=10)]
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(root), str(stop)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        for number in range(20):
            publish(Workspace(root), runs[number % 2])
        stop.touch()
        output, errors = reader.communicate(timeout=60)
    finally:
        reader.kill()
        reader.wait()
    assert reader.returncode == 0, errors
    seen = json.loads(output)
    assert seen["reads"] > 1
    assert set(seen["counts"]) <= {12, 30}


def test_a_reader_with_an_open_catalog_does_not_stop_a_publisher(tmp_path: Path) -> None:
    first = publish_run(tmp_path, "run-1")
    with duckdb.connect(str(tmp_path / "catalog.duckdb"), read_only=True) as catalog:
        publish_run(tmp_path, "run-2", samples=10)
        assert catalog.execute("SELECT count(*) FROM scores").fetchall() == [(12,)]
    assert first.run == "run-1"
    assert rows(tmp_path, "SELECT count(*) FROM scores") == [(30,)]
