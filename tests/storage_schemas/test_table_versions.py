"""A table that a later release gave one more column: files of both releases in one workspace."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from storage_schemas import tables
from storage_schemas.audit.lineage import lineage
from storage_schemas.audit.verify import duplicated_pairs
from storage_schemas.commit import commit_table, input_key, read_manifest
from storage_schemas.errors import StoreError
from storage_schemas.heads.metrics_history import mean_value
from storage_schemas.publishing import export
from storage_schemas.publishing.export import export_datasets, export_parquet
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.ledger import read_ledger
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.snapshots import read_ranks
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.sql import views
from storage_schemas.sql.views import connect
from storage_schemas.table import Added, DamagedTable, Table
from storage_schemas.workspace import Workspace, part
from tests.storage_schemas.workspaces import (
    KEY,
    finish_run,
    first_version,
    plan_run,
    shard_key,
    show,
    spoil_column,
    with_column,
    write_table,
)

OLD = first_version(tables.SCORES)
NEW = with_column(OLD, "noise", pa.float64(), 0.25, position=1)
ROWS: list[dict[str, object]] = [{"query_id": "q", "train_id": train, "score": float(train)} for train in range(3)]
NEW_ROWS = [row | {"noise": 2.0} for row in ROWS]


def test_a_file_that_is_older_than_a_column_has_its_default_in_order_and_type(tmp_path: Path) -> None:
    found = tables.read(write_table(part(tmp_path, 0), OLD, ROWS), NEW)
    assert found.schema.equals(NEW.schema)
    assert found.column_names == ["query_id", "noise", "train_id", "score"]
    assert found.to_pylist() == [row | {"noise": 0.25} for row in ROWS]


@pytest.mark.parametrize(
    ("kind", "default"),
    [(pa.string(), "it's"), (pa.int32(), 7), (pa.bool_(), True), (pa.float32(), None), (tables.INSTANT, None)],
)
def test_a_default_may_be_of_any_kind(tmp_path: Path, kind: pa.DataType, default: str | int | bool | None) -> None:
    table = with_column(OLD, "new", kind, default)
    found = tables.read(write_table(part(tmp_path, 0), OLD, ROWS), table)
    assert found.schema.equals(table.schema)
    assert found["new"].to_pylist() == [default] * 3


def test_rows_are_given_without_a_column_that_came_later(tmp_path: Path) -> None:
    """Who knows nothing of it need not name it."""
    rows = NEW.rows(query_id=["q"] * 2, train_id=[1, 2], score=[0.5, 0.25])
    assert rows.schema.equals(NEW.schema) and rows["noise"].to_pylist() == [0.25] * 2
    assert NEW.rows(query_id=["q"], train_id=[1], score=[0.5], noise=[2.0])["noise"].to_pylist() == [2.0]
    with pytest.raises(TypeError, match="scores has the columns"):
        NEW.rows(query_id=["q"], train_id=[1], noise=[2.0])


def test_parts_of_both_releases_are_one_table(tmp_path: Path) -> None:
    write_table(part(tmp_path, 0), NEW, NEW_ROWS)
    write_table(part(tmp_path, 1), OLD, ROWS)
    assert tables.read_parts(tmp_path, NEW)["noise"].to_pylist() == [2.0] * 3 + [0.25] * 3


@pytest.mark.parametrize(("table", "rows", "kept"), [(OLD, ROWS, 0.25), (NEW, NEW_ROWS, 2.0)], ids=["old", "new"])
def test_rows_are_chosen_by_a_column_that_the_file_may_lack(
    tmp_path: Path, table: Table, rows: list[dict[str, object]], kept: float
) -> None:
    path = write_table(part(tmp_path, 0), table, rows)
    chosen = (pc.field("noise") == kept) & (pc.field("train_id") > 0)
    found = tables.read(path, NEW, chosen, columns=["score"])
    assert found.to_pydict() == {"score": [1.0, 2.0]}
    assert tables.read(path, NEW, pc.field("noise") != kept).num_rows == 0


def test_single_columns_are_filled_too(tmp_path: Path) -> None:
    path = write_table(part(tmp_path, 0), OLD, ROWS)
    assert tables.read(path, NEW, columns=["noise"]).to_pydict() == {"noise": [0.25] * 3}
    found = tables.read(path, NEW, columns=["score", "noise"])
    assert found.schema.equals(pa.schema([NEW.schema.field("score"), NEW.schema.field("noise")]))


def test_columns_that_are_not_asked_for_stay_unread(tmp_path: Path) -> None:
    """The images are most of a queries file: with one of them destroyed the other columns are still there."""
    image = {"query_id": "q", "split": "test", "caption": "c", "image": b"\x89PNG", "image_sha256": "0" * 64}
    path = write_table(tmp_path / "queries.parquet", tables.QUERIES, [image])
    spoil_column(path, "image")
    found = tables.read(path, tables.QUERIES, columns=["query_id", "image_sha256"])
    assert found.to_pylist() == [{"query_id": "q", "image_sha256": "0" * 64}]
    with pytest.raises(DamagedTable, match="is damaged"):
        tables.read(path, tables.QUERIES)


def test_a_file_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = write_table(part(tmp_path, 0), NEW, NEW_ROWS)
    with pytest.raises(StoreError) as refusal:
        tables.read(path, OLD)
    assert str(refusal.value) == (
        f"{path} has schema version 3, this release reads 2 of scores: use the release that wrote it, or a newer one"
    )


def test_a_file_that_is_older_than_the_oldest_version_is_refused(tmp_path: Path) -> None:
    path = write_table(part(tmp_path, 0), OLD, ROWS)
    later = dataclasses.replace(NEW, version=5, oldest=4, added={"noise": Added(5, 0.25)})
    with pytest.raises(DamagedTable, match="version 2, this release reads 4 to 5 of scores: run the stage"):
        tables.read(path, later)


@pytest.mark.parametrize("added", [{}, {"noise": Added(2, 0.25)}], ids=["no default", "of its own version"])
def test_a_file_that_lacks_a_column_without_a_default_is_refused(tmp_path: Path, added: dict[str, Added]) -> None:
    path = write_table(part(tmp_path, 0), OLD, ROWS)
    with pytest.raises(DamagedTable, match=r"part-00000.parquet lacks noise, .* run the stage"):
        tables.read(path, dataclasses.replace(NEW, added=added))


def test_a_column_more_leaves_the_keys_of_its_table_and_a_later_oldest_version_changes_them() -> None:
    assert input_key("x", table=NEW) == input_key("x", table=OLD) == input_key("x")
    assert input_key("x", table=dataclasses.replace(NEW, oldest=3)) != input_key("x")


def test_file_and_manifest_say_which_version_of_the_table_was_written(tmp_path: Path) -> None:
    for number, table, rows, version in ((0, OLD, ROWS, "2"), (1, NEW, NEW_ROWS, "3")):
        path = write_table(part(tmp_path, number), table, rows)
        manifest = read_manifest(path)
        assert manifest is not None and manifest.schema_version == version
        assert pq.read_schema(path).metadata[b"schema_version"] == version.encode()


def test_a_file_of_the_release_before_answers_to_the_same_key(tmp_path: Path) -> None:
    """Its writer died before the manifest was there."""
    path = write_table(part(tmp_path, 0), OLD, ROWS)
    path.with_name(path.name + ".manifest.json").unlink()
    manifest = commit_table(path, pa.Table.from_pylist(NEW_ROWS, schema=NEW.schema), NEW, key=KEY, started=0.0)
    assert manifest.schema_version == "2"
    assert tables.read(path, NEW)["noise"].to_pylist() == [0.25] * 3


def becomes(monkeypatch: pytest.MonkeyPatch, scores: Table, ranks: Table) -> None:
    """This code as a release that has these scores and ranks."""
    shown = {
        "RANKS_VIEW": [*ranks.schema, tables.RANKS_VIEW.schema.field("influence")],
        "RUN_SCORES": [tables.RUN_SCORES.schema.field("run"), *scores.schema],
        "EXACT_CHECK": scores.schema,
    }
    changed = {
        name: dataclasses.replace(getattr(tables, name), schema=pa.schema(fields)) for name, fields in shown.items()
    }
    for name, table in {**changed, "SCORES": scores, "RANKS": ranks}.items():
        monkeypatch.setattr(tables, name, table)
    monkeypatch.setattr(export, "RANKS", ranks)
    # Releases that have shares have scores with errors.
    monkeypatch.setattr(views, "shares_macro", lambda: "SELECT 1")
    monkeypatch.setattr(views, "shares_view", lambda: f"SELECT {views._no_values(tables.SHARES_VIEW)} WHERE false")


@pytest.fixture(autouse=True)
def first_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever columns came since, tests begin without them."""
    becomes(monkeypatch, OLD, first_version(tables.RANKS))


@pytest.fixture
def later_release(monkeypatch: pytest.MonkeyPatch, first_release: None) -> None:
    """A release in which scores, their ranks and metrics have one column more."""
    becomes(monkeypatch, NEW, with_column(tables.RANKS, "noise", pa.float64(), 0.25, position=1))
    monkeypatch.setattr(tables, "METRICS", with_column(tables.METRICS, "seed", pa.int32(), -1))


def mixed_workspace(root: Path) -> Workspace:
    """Run old is all of the release before, run new has a shard of each; metrics are old, those of a study new."""
    workspace = Workspace(root)
    queries = ("q1", "q2")
    plan_run(root, "old", queries=["q0"])
    plan_run(root, "new", queries=queries)
    for run, shard, query, table in (("old", 0, "q0", OLD), ("new", 0, "q1", OLD), ("new", 1, "q2", tables.SCORES)):
        extra: dict[str, object] = {"noise": 2.0} if table is not OLD else {}
        rows = [{"query_id": query, "train_id": train, "score": float(train), **extra} for train in range(4)]
        write_table(workspace.score_shard(run, shard), table, rows, shard_key(run, shard))
    return workspace


def sql(workspace: Workspace, statement: str) -> list[tuple[object, ...]]:
    with connect(workspace.root) as connection:
        return connection.sql(statement).fetchall()


NOISE_BY_QUERY = [("q0", 0.25, 4), ("q1", 0.25, 4), ("q2", 2.0, 4)]


@pytest.mark.heavy
def test_a_run_that_the_release_before_began_is_counted_compacted_and_published(
    tmp_path: Path, later_release: None
) -> None:
    workspace = mixed_workspace(tmp_path)
    assert set(read_ledger(workspace, "new")["state"].to_pylist()) == {"done"}
    assert duplicated_pairs(workspace, "new") == 0
    noise = "SELECT query_id, noise, count(*) FROM {} GROUP BY ALL ORDER BY ALL"
    assert sql(workspace, noise.format("run_scores")) == NOISE_BY_QUERY
    publish_runs(workspace, ["old", "new"])
    for view in ("scores", "ranks", "run_scores"):
        assert sql(workspace, noise.format(view)) == NOISE_BY_QUERY, view
    assert sql(workspace, "SELECT max(train_id) FROM ranks WHERE noise = 2 AND rank = 1") == [(3,)]


@pytest.mark.heavy
def test_parts_of_the_release_before_are_read_beside_those_of_this_one(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    finish_run(tmp_path, "old", queries=["q0"])
    published = publish_runs(Workspace(tmp_path), ["old"])
    request.getfixturevalue("later_release")
    workspace = mixed_workspace(tmp_path)
    again = publish_runs(workspace, ["old"])
    assert again.snapshot == published.snapshot, "the same rows are the same snapshot"
    snapshot = publish_runs(workspace, ["old", "new"]).snapshot
    found = sql(workspace, "SELECT query_id, noise, count(*) FROM ranks GROUP BY ALL ORDER BY ALL")
    assert found == NOISE_BY_QUERY
    read = read_ranks(workspace, snapshot, ["q0", "q2"])
    assert read.schema.equals(tables.RANKS.schema)
    assert read["noise"].to_pylist() == [0.25] * 4 + [2.0] * 4
    assert export_columns(workspace) == {"old": [0.25], "new": [0.25, 2.0]}
    vacuum(workspace, older_than=timedelta(0))
    assert not workspace.score_shard("new", 1).exists()
    compact(workspace, "new", negatives="tie")
    assert export_columns(workspace) == {"old": [0.25], "new": [0.25, 2.0]}, "out of large files"


def export_columns(workspace: Workspace) -> dict[str, list[float]]:
    """The new column's values in an export of each run."""
    found = {}
    for run in ("old", "new"):
        path = Path(workspace.root) / f"{run}.parquet"
        export_parquet(workspace, run, path)
        found[run] = sorted(set(pq.read_table(path)["noise"].to_pylist()))
        path.unlink()
    return found


@pytest.mark.heavy
def test_metrics_and_checked_pairs_of_both_releases_are_one_view(tmp_path: Path, later_release: None) -> None:
    workspace = mixed_workspace(tmp_path)
    publish_runs(workspace, ["old", "new"])
    row = {"metric": "mAP", "space": "tuned", "split": "test", "cutoff": 2, "query_id": "", "queries": 3}
    figures = row | {"value": 0.5, "standard_error": 0.1}
    old_metrics = first_version(tables.METRICS)
    write_table(workspace.metrics("m"), old_metrics, [figures])
    write_table(workspace.metrics("s"), tables.METRICS, [figures | {"seed": 5}])
    write_table(part(workspace.exact_check("x"), 0), OLD, ROWS)
    paths = {
        "metrics": workspace.metrics("m"),
        "study": workspace.metrics("s"),
        "exact_check": workspace.exact_check("x"),
    }
    changes = {name: workspace.relative(path) for name, path in paths.items()}
    show(workspace, **changes)
    assert sql(workspace, "SELECT seed, value FROM metrics ORDER BY seed") == [(-1, 0.5), (5, 0.5)]
    assert sql(workspace, "SELECT DISTINCT noise FROM exact_check") == [(0.25,)]
    assert mean_value(workspace.metrics("m"), "mAP", "tuned", 2) == 0.5
    show(workspace, metrics=changes["metrics"], study=None)
    assert sql(workspace, "SELECT seed FROM metrics") == [(-1,)], "no file has the column"


@pytest.mark.heavy
def test_a_pair_is_explained_out_of_files_of_both_releases(tmp_path: Path, later_release: None) -> None:
    workspace = mixed_workspace(tmp_path)
    publish_runs(workspace, ["old", "new"])
    for query in ("q0", "q1", "q2"):
        facts = lineage(workspace, f"{query}:3").facts
        assert (facts["score"], facts["rank"], facts["shard_found_by"]) == ("3.0", "1", "its file")


def test_publishing_compares_query_images_without_reading_them(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for run in ("first", "second"):
        finish_run(tmp_path, run)
        spoil_column(Path(workspace.queries(run)), "image")
    assert publish_runs(workspace, ["first", "second"]).queries == [
        workspace.relative(workspace.queries(run)) for run in ("first", "second")
    ]


def test_readers_of_some_columns_refuse_a_newer_file_too(tmp_path: Path) -> None:
    workspace, newer = Workspace(tmp_path / "w"), dataclasses.replace(tables.QUERIES, version=3)
    finish_run(workspace.root, "run-1", queries=["q0"])
    publish_runs(workspace, ["run-1"])
    row = {"query_id": "q0", "split": "test", "caption": "c", "image": b"png", "image_sha256": "0" * 64}
    write_table(workspace.queries("run-1"), newer, [row], key="another")
    with pytest.raises(DamagedTable, match="version 3"):
        export_datasets(workspace, "run-1", tmp_path / "out")
    (query,) = (node for node in lineage(workspace, "q0:1").made_from if node.kind == "query")
    assert "version 3" in query.facts["file"]
