from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from storage_schemas import tables
from storage_schemas.commit import manifest_path
from storage_schemas.errors import StoreError
from storage_schemas.heads.records import CheckRecord, write_checks_record
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.attempts import AttemptLog
from storage_schemas.runs.ledger import run_names, write_ledger
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.sql.views import RefusedStatement, connect, query
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import commit_shard, plan_run, publish_run, show, write_table

ROOT = Path(__file__).parents[3]
VIEWS = (
    "samples",
    "rejected_samples",
    "queries",
    "twins",
    "candidates",
    "base_losses",
    "scores",
    "ranks",
    "run_scores",
    "shares",
    "exact_check",
    "metrics",
    "study",
    "retrainings",
    "retrained_losses",
    "regenerations",
    "regeneration_distances",
)
LOADED = ("shards", "quarantined_samples", "runs", "heads", "indexes", "sketches", "tombstones")


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


@pytest.mark.heavy
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
        ("study", 0),
        ("base_losses", 1),
        ("run_scores", 12),
        ("shards", 3),
        ("runs", 1),
        ("heads", 0),
        ("indexes", 0),
        ("sketches", 0),
    ],
)
def test_every_table_is_counted_by_sql(published_root: Path, view: str, count: int) -> None:
    assert rows(published_root, f"SELECT count(*) FROM {view}") == [(count,)]


@pytest.mark.heavy
def test_tables_are_joined_by_sql(published_root: Path) -> None:
    statement = """
        SELECT r.query_id, s.key, q.caption, r.score, s.captions[2]
        FROM ranks r JOIN samples s USING (train_id) JOIN queries q USING (query_id)
        WHERE r.rank = 1 ORDER BY r.query_id
    """
    best = [(f"q{number}", "s2", "a cat", 2.0, "a dog") for number in range(3)]
    assert rows(published_root, statement) == best


@pytest.mark.heavy
def test_a_run_without_metrics_has_empty_tables_in_their_place(tmp_path: Path) -> None:
    publish_run(tmp_path)
    for view in ("metrics", "exact_check", "base_losses", "heads", "indexes"):
        assert rows(tmp_path, f"SELECT * FROM {view}") == []


@pytest.mark.heavy
def test_a_study_of_an_earlier_release_stays_among_the_metrics(tmp_path: Path) -> None:
    publish_run(tmp_path, extras=True)
    workspace = Workspace(tmp_path)
    figure = {"metric": "mAP", "split": "test", "cutoff": 2, "query_id": "", "value": 0.5, "standard_error": 0.1}
    named = figure | {"space": "study: loss = mse, seed 0", "queries": 3}
    old = write_table(workspace.study("k") / "study-1.parquet", tables.METRICS, [named])
    show(workspace, study=workspace.relative(old))
    (run,) = run_names(workspace)
    assert publish_runs(workspace, [run]).study == workspace.relative(old)
    spaces = [("study: loss = mse, seed 0",), ("tuned",)]
    assert rows(tmp_path, "SELECT space FROM metrics ORDER BY space") == spaces
    assert rows(tmp_path, "SELECT * FROM study") == []
    asked = figure | {"space": "tuned", "queries": 3, "question": "loss", "choice": "mse", "seed": 0}
    new = write_table(workspace.study("k") / "study-2.parquet", tables.STUDY, [asked])
    show(workspace, compared_heads=workspace.relative(new))
    assert publish_runs(workspace, [run]).compared_heads == workspace.relative(new)
    assert rows(tmp_path, "SELECT question, choice, seed, value FROM study") == [("loss", "mse", 0, 0.5)]


@pytest.mark.heavy
@pytest.mark.parametrize("extras", [True, False])
def test_what_a_teacher_was_found_to_be_is_seen_at_once_and_in_place_of_what_it_was(
    tmp_path: Path, extras: bool
) -> None:
    publish_run(tmp_path, extras=extras)
    workspace = Workspace(tmp_path)
    (run,) = run_names(workspace)
    before = rows(tmp_path, "SELECT metric, space, value FROM metrics")
    figure = {"split": "test", "cutoff": 0, "query_id": "", "standard_error": 0.1, "queries": 3}
    found = [figure | {"metric": "lds", "space": "teacher", "value": 0.5}]
    found += [
        figure | {"metric": metric, "space": space, "value": -1.0, "cutoff": 2}  # a copy of it is older
        for metric, space, _ in before
    ]
    path = write_table(workspace.teacher_check("k"), tables.METRICS, found)
    write_checks_record(workspace, run, {"retraining check": CheckRecord("k", workspace.relative(path), len(found))})
    seen = rows(tmp_path, "SELECT metric, space, value FROM metrics ORDER BY metric")
    assert seen == [("lds", "teacher", 0.5), *((metric, space, -1.0) for metric, space, _ in before)]
    path.unlink()
    with pytest.raises(StoreError, match=r"which a check of run .* is gone: `fastgda judge CONFIG`"):
        rows(tmp_path, "SELECT count(*) FROM metrics")


@pytest.mark.heavy
@pytest.mark.parametrize("extras", [True, False])
def test_every_column_of_every_view_is_explained(tmp_path: Path, extras: bool) -> None:
    publish_run(tmp_path, extras=extras)
    columns = rows(tmp_path, "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE NOT internal")
    comments = {(table, column): comment for table, column, comment in columns}
    assert {table for table, _ in comments} == {*VIEWS, *LOADED}
    assert {place for place, comment in comments.items() if not comment} == set()
    for kind in ("view", "table"):
        statement = f"SELECT {kind}_name, comment FROM duckdb_{kind}s() WHERE NOT internal"
        assert all(comment for _, comment in rows(tmp_path, statement))


@pytest.mark.heavy
def test_an_absent_table_has_the_types_of_a_present_one(tmp_path: Path, published_root: Path) -> None:
    publish_run(tmp_path)
    statement = "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = 'metrics' ORDER BY column_index"
    assert rows(tmp_path, statement) == rows(published_root, statement)


@pytest.mark.heavy
def test_the_ledger_stands_in_sql(tmp_path: Path) -> None:
    publish_run(tmp_path)
    workspace = Workspace(tmp_path)
    statement = "SELECT shard, state, device, rows FROM shards ORDER BY shard"
    assert rows(tmp_path, statement) == [(n, "done", "x", 4) for n in range(3)]
    path = workspace.score_shard("run-1", 1)
    manifest_path(path).unlink()
    path.unlink()
    with pytest.raises(RuntimeError), AttemptLog(workspace, "run-1").attempt(1, "cuda:0"):
        raise RuntimeError("CUDA error: device lost")
    write_ledger(workspace, "run-1")
    assert rows(tmp_path, "SELECT shard, state, device, rows, error_class, error FROM shards ORDER BY shard") == [
        (0, "done", "x", 4, "", ""),
        (1, "failed", "cuda:0", 0, "RuntimeError", "CUDA error: device lost"),
        (2, "done", "x", 4, "", ""),
    ]


@pytest.mark.heavy
def test_a_first_run_is_seen_while_it_grows(tmp_path: Path) -> None:
    plan_run(tmp_path)
    write_ledger(Workspace(tmp_path), "run-1")
    for number, query_id in enumerate(("q0", "q1", "q2")):
        assert rows(tmp_path, "SELECT count(*) FROM run_scores") == [(4 * number,)]
        assert rows(tmp_path, "SELECT count(*) FROM scores") == [(0,)]
        commit_shard(tmp_path, "run-1", number, query_id)
    assert rows(tmp_path, "SELECT run, state, shards, done, pairs FROM runs") == [("run-1", "planned", 3, 0, 12)]
    write_ledger(Workspace(tmp_path), "run-1")
    assert rows(tmp_path, "SELECT state, done, rows FROM runs") == [("done", 3, 12)]
    publish_runs(Workspace(tmp_path), ["run-1"])
    assert rows(tmp_path, "SELECT state, done, rows FROM runs") == [("published", 3, 12)]
    assert rows(tmp_path, "SELECT count(*) FROM scores") == [(12,)]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO heads VALUES ('h', 'r', 's', 'f', 0, 0, false)",
        "INSERT INTO heads VALUES ('h', 'r', 's', 'f', 0, 0, false) RETURNING run",
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


@pytest.mark.heavy
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
def test_files_outside_the_workspace_are_not_read(published_root: Path, statement: str) -> None:
    outside, twin = published_root.parent, published_root.with_name("workspace-twin")
    twin.mkdir(exist_ok=True)
    for folder in (outside, twin):
        (folder / "secret.txt").write_text("secret")
        (folder / "secret.json").write_text("{}")
    write_table(outside / "secret.parquet", tables.INDEX_IDS, [{"train_id": 1}])
    with pytest.raises((duckdb.PermissionException, duckdb.CatalogException)):
        rows(published_root, statement.format(root=published_root, outside=outside))


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


@pytest.mark.heavy
def test_the_published_run_is_the_latest_and_runs_are_kept(tmp_path: Path) -> None:
    first = publish_run(tmp_path, "run-1")
    second = publish_run(tmp_path, "run-2", samples=7)
    assert read_published(Workspace(tmp_path)) == second
    assert rows(tmp_path, "SELECT count(*) FROM scores") == [(21,)]
    for _ in range(2):
        assert publish_runs(Workspace(tmp_path), ["run-1"]).snapshot == first.snapshot
    assert rows(tmp_path, "SELECT count(*) FROM scores") == [(12,)]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run-1", "run-2"]


@pytest.mark.heavy
def test_the_catalog_file_answers_like_a_connection(published_root: Path) -> None:
    with duckdb.connect(str(published_root / "catalog.duckdb"), read_only=True) as catalog:
        for view in (*VIEWS, *LOADED):
            statement = f"SELECT count(*) FROM {view}"
            assert catalog.execute(statement).fetchall() == rows(published_root, statement)
    assert not list(published_root.glob(".*"))


@pytest.mark.heavy
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


@pytest.mark.heavy
def test_hostile_ids_and_captions_survive(tmp_path: Path) -> None:
    ids = ["'; DROP VIEW scores; --", 'a "b"\n\tc', "../../etc/passwd", "🎈", "%s {x} $1 \\", "nul \x00"]
    captions = ["'); DELETE FROM samples; --", "two\nlines 👩🏽‍🚀", "x" * 100_000]
    publish_run(tmp_path, queries=ids, captions=captions)
    assert {row[0] for row in rows(tmp_path, "SELECT DISTINCT query_id FROM ranks")} == set(ids)
    assert rows(tmp_path, "SELECT captions FROM samples LIMIT 1") == [(captions,)]
    assert rows(tmp_path, "SELECT DISTINCT caption FROM queries") == [(captions[0],)]


READER = """
import json, sys
from pathlib import Path
import duckdb
from storage_schemas.sql.views import query

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


@pytest.mark.integration
def test_readers_never_fail_while_runs_are_published(tmp_path: Path) -> None:
    root, stop = tmp_path / "workspace", tmp_path / "stop"
    for run, samples in (("run-1", 4), ("run-2", 10)):
        publish_run(root, run, samples=samples)
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
            publish_runs(Workspace(root), [f"run-{number % 2 + 1}"])
        stop.touch()
        output, errors = reader.communicate(timeout=60)
    finally:
        reader.kill()
        reader.wait()
    assert reader.returncode == 0, errors
    seen = json.loads(output)
    assert seen["reads"] > 1
    assert set(seen["counts"]) <= {12, 30}


@pytest.mark.heavy
def test_a_reader_with_an_open_catalog_does_not_stop_a_publisher(tmp_path: Path) -> None:
    first = publish_run(tmp_path, "run-1")
    with duckdb.connect(str(tmp_path / "catalog.duckdb"), read_only=True) as catalog:
        publish_run(tmp_path, "run-2", samples=10)
        assert catalog.execute("SELECT count(*) FROM scores").fetchall() == [(12,)]
    assert first.run == "run-1"
    assert rows(tmp_path, "SELECT count(*) FROM scores") == [(30,)]
