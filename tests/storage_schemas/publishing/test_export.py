from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage_schemas
from storage_schemas import tables
from storage_schemas.commit import TableCommit, commit_table, commit_tables, input_key
from storage_schemas.publishing.export import DestinationTaken, UnknownQueries, export_datasets, export_parquet
from storage_schemas.runs.ledger import write_plan
from storage_schemas.runs.records import RunRecord, UnknownRun
from storage_schemas.snapshots.compaction import RunUnfinished, compact
from storage_schemas.tables import RANKS
from storage_schemas.workspace import Workspace

RUN = "shapes-1"
COLUMNS, SCORED = (", ".join(table.schema.names) for table in (RANKS, tables.SCORES))
CAPTIONS = {
    "q-b": 'a "quoted" cat, it\'s \\ odd',
    "q-a": "first line\nsecond\r\nthird\ttab",
    "q-c": "🐈\u200d⬛ naïve 猫 | pipe",
}


def scored_run(
    root: Path,
    query_ids: Sequence[str] = tuple(CAPTIONS),
    *,
    candidates: int = 5,
    captions: Sequence[str] | None = None,
    leave_out: int = 0,
) -> Workspace:
    """A run whose queries are scored against `candidates` samples, a score shard each, except the last `leave_out`."""
    workspace = Workspace(root)
    numbers = range(len(query_ids))
    queries = None
    if captions is not None:
        path = workspace.queries("k")
        rows = tables.QUERIES.rows(
            query_id=list(query_ids),
            split=["test"] * len(query_ids),
            caption=list(captions),
            image=[b"png"] * len(query_ids),
            image_sha256=["0" * 64] * len(query_ids),
        )
        commit_table(path, rows, tables.QUERIES, key="k", started=time.monotonic())
        queries = workspace.relative(path)
    record = RunRecord(
        run=RUN,
        name="shapes",
        teacher="abu_plus",
        created_at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        shards=len(query_ids),
        pairs=candidates * len(query_ids),
        queries=queries,
        config={},
    )
    keys, pairs = [input_key(RUN, number) for number in numbers], [candidates] * len(query_ids)
    write_plan(
        workspace,
        record,
        tables.PLAN_SHARDS.rows(shard=numbers, input_key=keys, query_block=numbers, pairs=pairs),
        tables.PLAN_QUERIES.rows(query_id=list(query_ids), query_block=numbers, pairs=pairs),
    )
    draw = np.random.default_rng(7)
    shards = [
        TableCommit(
            workspace.score_shard(RUN, number),
            tables.SCORES.rows(
                query_id=[query_id] * candidates,
                train_id=draw.permutation(4 * candidates)[:candidates],
                score=draw.integers(-3, 3, candidates) / 7,  # with ties
            ),
            tables.SCORES,
            keys[number],
            time.monotonic(),
        )
        for number, query_id in enumerate(query_ids)
    ]
    commit_tables(shards[: len(shards) - leave_out])
    return workspace


def sql_ranks(workspace: Workspace) -> pa.Table:
    """Ranks of the run's scores, computed by a window over what SQL shows of the run, without the compacted files."""
    with storage_schemas.connect(workspace.root) as connection:
        return connection.sql(f"""
            SELECT {SCORED}, rank::INTEGER AS rank, (rank / count(*) OVER q)::FLOAT AS rank_label
            FROM (
                SELECT *, row_number() OVER (PARTITION BY query_id ORDER BY score DESC, train_id) AS rank
                FROM run_scores
            ) WINDOW q AS (PARTITION BY query_id) ORDER BY query_id, rank
        """).to_arrow_table()


def test_parquet_is_what_sql_says(tmp_path: Path) -> None:
    workspace = scored_run(tmp_path / "w", candidates=50)
    expected = sql_ranks(workspace)
    destination = tmp_path / "new folder" / "it's.parquet"
    export_parquet(workspace, RUN, destination)
    assert tables.read(destination, RANKS).equals(expected.cast(RANKS.schema))
    assert pd.read_parquet(destination).equals(expected.to_pandas())
    by_duckdb = duckdb.sql(f"SELECT {COLUMNS} FROM read_parquet('{str(destination).replace(chr(39), 2 * chr(39))}')")
    assert by_duckdb.fetchall() == [tuple(row.values()) for row in expected.to_pylist()]
    schema = pq.read_schema(destination)
    assert schema.names == RANKS.schema.names
    assert schema.metadata[b"schema_version"].decode() == str(tables.RANKS.version)
    assert [path.name for path in destination.parent.iterdir()] == [destination.name]


def small_parts(monkeypatch: pytest.MonkeyPatch, part_rows: int) -> None:
    """Exports compact into parts of this size, not of millions of rows."""
    monkeypatch.setattr("storage_schemas.publishing.export.compact", functools.partial(compact, part_rows=part_rows))


def test_parquet_of_many_parts_is_one_sorted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch, 30)
    query_ids = [f"q{number}" for number in range(12)]
    workspace = scored_run(tmp_path / "w", query_ids, candidates=9)
    expected = sql_ranks(workspace)
    export_parquet(workspace, RUN, tmp_path / "scores.parquet")
    assert len(list((tmp_path / "w" / "ranks" / RUN).glob("part-*.parquet"))) == 4
    assert tables.read(tmp_path / "scores.parquet", RANKS).equals(expected.cast(RANKS.schema))


@pytest.mark.parametrize("export", [export_parquet, export_datasets])
def test_unfinished_and_unknown_runs_leave_nothing(tmp_path: Path, export: object) -> None:
    workspace = scored_run(tmp_path / "w", leave_out=1)
    destination = tmp_path / "out" / "scores"
    with pytest.raises(RunUnfinished, match="1 of 3"):
        export(workspace, RUN, destination)  # type: ignore[operator]
    with pytest.raises(UnknownRun, match=RUN):
        export(workspace, "other", destination)  # type: ignore[operator]
    assert not destination.parent.exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    workspace = scored_run(tmp_path / "w")
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for export in (export_parquet, export_datasets):
        with pytest.raises(DestinationTaken, match="taken"):
            export(workspace, RUN, taken)
    assert taken.read_text() == "mine"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DestinationTaken, match="not an empty folder"):
        export_datasets(workspace, RUN, folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_damaged_part_is_named_and_no_file_appears(tmp_path: Path) -> None:
    workspace = scored_run(tmp_path / "w", candidates=2000)
    (part,) = compact(workspace, RUN)
    path = tmp_path / "w" / part.path
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*fastgda verify"):
        export_parquet(workspace, RUN, tmp_path / "out" / "scores.parquet")
    assert list((tmp_path / "out").iterdir()) == []


def load_dataset(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """What `datasets` makes of the folder, without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(cache))
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(folder), cache_dir=str(cache))
    assert list(loaded) == ["train"]
    return loaded["train"].data.table.combine_chunks()


@pytest.mark.heavy
def test_datasets_loads_the_folder_with_any_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = scored_run(tmp_path / "w", captions=list(CAPTIONS.values()))
    expected = sql_ranks(workspace)
    export_datasets(workspace, RUN, tmp_path / "folder")
    loaded = load_dataset(tmp_path / "folder", tmp_path / "cache", monkeypatch)
    assert loaded.column_names == ["query_id", "caption", *RANKS.schema.names[1:]]
    assert loaded.select(RANKS.schema.names).cast(expected.schema).equals(expected)
    assert loaded["caption"].to_pylist() == [CAPTIONS[query_id] for query_id in loaded["query_id"].to_pylist()]


def test_datasets_folder_without_captions_and_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = scored_run(tmp_path / "w")
    expected = sql_ranks(workspace)
    small_parts(monkeypatch, 5)
    folder = tmp_path / "folder"
    folder.mkdir()
    export_datasets(workspace, RUN, folder)
    names = [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    assert sorted(path.name for path in (folder / "data").iterdir()) == names
    loaded = load_dataset(folder, tmp_path / "cache", monkeypatch)
    assert loaded.cast(expected.schema).equals(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "folder", "w"]


def test_captions_stand_by_their_rows_in_every_row_group(tmp_path: Path) -> None:
    workspace = scored_run(tmp_path / "w", candidates=50_000, captions=list(CAPTIONS.values()))
    export_datasets(workspace, RUN, tmp_path / "folder")
    (path,) = (tmp_path / "folder" / "data").iterdir()
    assert pq.read_metadata(path).num_row_groups == 2
    pairs = duckdb.read_parquet(str(path)).aggregate("query_id, caption, count(*)").fetchall()
    assert sorted(pairs) == sorted((query_id, caption, 50_000) for query_id, caption in CAPTIONS.items())


def test_card_says_what_the_rows_are(tmp_path: Path) -> None:
    workspace = scored_run(tmp_path / "w", captions=list(CAPTIONS.values()))
    export_datasets(workspace, RUN, tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    info = yaml.safe_load(head)["dataset_info"]
    assert info["splits"] == [{"name": "train", "num_examples": 15}]
    types = {feature["name"]: feature["dtype"] for feature in info["features"]}
    assert list(types) == ["query_id", "caption", *RANKS.schema.names[1:]]
    assert types == {
        "query_id": "string",
        "caption": "string",
        "train_id": "int64",
        "score": "float64",
        "standard_error": "float32",
        "rank": "int32",
        "rank_label": "float32",
    }
    for said in (RUN, "abu_plus", "2026-01-02 03:04", "1 = the most influential", "15 rows of 3 queries"):
        assert said in text


def test_a_query_without_caption_is_named(tmp_path: Path) -> None:
    workspace = scored_run(tmp_path / "w", captions=list(CAPTIONS.values()))
    path = workspace.queries("k")
    commit_table(path, tables.read(path, tables.QUERIES).slice(1), tables.QUERIES, key="j", started=time.monotonic())
    with pytest.raises(UnknownQueries, match=r"lacks 1 queries.*'q-b'"):
        export_datasets(workspace, RUN, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.heavy
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_caption_survives(captions: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("any")
    query_ids = [f"q{number}" for number in range(len(captions))]
    workspace = scored_run(root / "w", query_ids, candidates=2, captions=captions)
    export_datasets(workspace, RUN, root / "folder")
    found = pq.read_table(root / "folder" / "data")
    assert dict(zip(found["query_id"].to_pylist(), found["caption"].to_pylist(), strict=True)) == dict(
        zip(query_ids, captions, strict=True)
    )


@pytest.mark.integration
def test_a_killed_export_leaves_no_destination(tmp_path: Path) -> None:
    workspace = scored_run(tmp_path / "w", [f"q{number}" for number in range(40)], candidates=5_000)
    compact(workspace, RUN, part_rows=5_000)
    destination = tmp_path / "out" / "scores.parquet"
    program = (
        "import sys, pathlib; from storage_schemas.publishing.export import export_parquet; "
        "from storage_schemas.workspace import Workspace; "
        "import functools; from storage_schemas.publishing import export; "
        "export.compact = functools.partial(export.compact, part_rows=5_000); "
        "export_parquet(Workspace.at(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(workspace.root), RUN, str(destination)])
    while process.poll() is None and not (destination.parent.exists() and any(destination.parent.iterdir())):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    if process.returncode:
        assert not destination.exists()
        export_parquet(workspace, RUN, destination)
    assert pq.read_metadata(destination).num_rows == 200_000
