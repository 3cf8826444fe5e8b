from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import tables
from storage_schemas.commit import commit_table, committed
from storage_schemas.files import any_path
from storage_schemas.table import Table
from storage_schemas.workspace import part

KEY = "0123456789abcdef"
ALL_TABLES = [value for value in vars(tables).values() if isinstance(value, Table)]


def scores(rows: list[tuple[str, int, float]]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"query_id": query, "train_id": train, "score": score} for query, train, score in rows],
        schema=tables.SCORES.schema,
    )


def sample(number: int, captions: list[str]) -> dict[str, object]:
    return {
        "train_id": number,
        "key": f"s{number}",
        "shard": "a.tar",
        "offset": 512,
        "size": 10,
        "captions": captions,
        "width": 2,
        "height": 3,
        "image_sha256": "0" * 64,
        "image_look": b"",
        "metadata": "{}",
    }


def commit_samples(path: Path, captions: list[list[str]]) -> None:
    rows = [sample(number, several) for number, several in enumerate(captions)]
    table = pa.Table.from_pylist(rows, schema=tables.SAMPLES.schema)
    commit_table(path, table, tables.SAMPLES, key=KEY, started=time.monotonic())


def test_a_committed_table_reads_back_with_its_row_count(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    table = scores([("q1", 2, 0.5), ("q1", 1, -1e300), ("q2", 1, 0.25)])
    commit_table(path, table, tables.SCORES, key=KEY, started=time.monotonic())
    manifest = committed(path, KEY)
    assert manifest is not None and manifest.rows == 3
    assert tables.read(path, tables.SCORES).equals(
        table.sort_by([("query_id", "ascending"), ("train_id", "ascending")])
    )
    assert tables.read(path, tables.SCORES).schema.equals(tables.SCORES.schema)


def test_a_narrower_table_is_cast_to_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    table = pa.table({"query_id": ["q"], "train_id": pa.array([3], pa.int32())})
    commit_table(path, table, tables.TWINS, key=KEY, started=time.monotonic())
    assert tables.read(path, tables.TWINS).to_pylist() == [{"query_id": "q", "train_id": 3}]


def test_a_table_with_a_column_too_few_is_not_committed(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    with pytest.raises(ValueError, match="score"):
        commit_table(path, pa.table({"query_id": ["q"], "train_id": [1]}), tables.SCORES, key=KEY, started=0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "caption",
    [
        "it's a \"quoted\" 'caption'; -- $1 %s {x} \\n",
        "two\nlines\r\nand\ta tab",
        "a 👩🏽‍🚀 in 宇宙 שלום",
        "nul \x00 inside",
        "word " * 20_000,
    ],
    ids=["quotes", "newlines", "emoji", "nul", "100 kB"],
)
def test_awkward_captions_survive_the_disk(tmp_path: Path, caption: str) -> None:
    path = tmp_path / "samples.parquet"
    commit_samples(path, [["plain", caption], [caption]])
    assert tables.read(path, tables.SAMPLES)["captions"].to_pylist() == [["plain", caption], [caption]]


@settings(max_examples=40)
@given(st.lists(st.lists(st.text(), min_size=1, max_size=3), min_size=1, max_size=4))
def test_any_caption_survives_the_disk(tmp_path_factory: pytest.TempPathFactory, captions: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("captions") / "samples.parquet"
    commit_samples(path, captions)
    assert tables.read(path, tables.SAMPLES)["captions"].to_pylist() == captions


@pytest.mark.parametrize(("metadata", "named"), [({"schema_version": "0"}, "0"), (None, "none")])
def test_a_file_of_another_schema_version_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None, named: str
) -> None:
    path = tmp_path / "part-00000.parquet"
    pq.write_table(scores([("q", 1, 0.5)]).replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match="run the stage that wrote it again") as refusal:
        tables.read(path, tables.SCORES)
    assert str(path) in str(refusal.value)
    assert f"schema version {named}" in str(refusal.value)
    assert "this release reads 2 to 3 of scores" in str(refusal.value)


def test_parts_are_concatenated_in_name_order_and_nothing_else_is_read(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        commit_table(
            part(tmp_path, number),
            scores([("q", number, 0.5), ("p", number, 0.5)]),
            tables.SCORES,
            key=KEY,
            started=0.0,
        )
    (tmp_path / ".123-part-00001.parquet").write_bytes(b"half a file of a killed writer")
    table = tables.read_parts(tmp_path, tables.SCORES)
    assert table["train_id"].to_pylist() == [0, 0, 2, 2, 10, 10]
    assert table["query_id"].to_pylist() == ["p", "q"] * 3


@pytest.mark.parametrize("exists", [True, False])
def test_no_parts_make_an_empty_table_of_the_schema(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "scores"
    if exists:
        folder.mkdir()
    table = tables.read_parts(folder, tables.SCORES)
    assert table.num_rows == 0
    assert table.schema.equals(tables.SCORES.schema)


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: table.name)
def test_every_table_and_column_is_explained(table: Table) -> None:
    schema = table.schema
    assert table.comment and len(schema) > 0
    assert all(field.metadata[b"comment"].strip() for field in schema)
    assert len(set(schema.names)) == len(schema.names)


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: table.name)
def test_the_settings_of_a_file_name_columns_that_there_are(table: Table) -> None:
    named = {*table.sorted_by, *table.dictionary, *table.delta}
    assert named <= set(table.schema.names)
    assert not set(table.dictionary) & set(table.delta)
    table.encode(table.schema.empty_table(), {})


def test_a_files_settings_are_those_of_its_table(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    table = scores([(f"q{n % 3}", n, 0.5) for n in range(300_000)])
    commit_table(path, table, tables.SCORES, key=KEY, started=time.monotonic())
    metadata = pq.read_metadata(path)
    group = metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    assert metadata.num_row_groups == 3 and group.num_rows == tables.SCORES.row_group_rows
    assert [sorting.column_index for sorting in group.sorting_columns] == [0, 1]
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert columns["query_id"].has_dictionary_page and not columns["score"].has_dictionary_page
    assert "DELTA_BINARY_PACKED" in columns["train_id"].encodings
    assert columns["train_id"].statistics.has_min_max


def test_rows_within_a_file_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    commit_table(path, scores([("b", 1, 0.1), ("a", 2, 0.2), ("a", 1, 0.3)]), tables.SCORES, key=KEY, started=0.0)
    columns = ["query_id", "train_id", "score"]
    assert [tuple(row.values()) for row in tables.read(path, tables.SCORES, columns=columns).to_pylist()] == [
        ("a", 1, 0.3),
        ("a", 2, 0.2),
        ("b", 1, 0.1),
    ]


def test_rows_need_the_columns_of_their_table_and_no_others() -> None:
    with pytest.raises(TypeError, match=r"scores has the columns .*score.*given were \['query_id', 'train_id'\]"):
        tables.SCORES.rows(query_id=["q"], train_id=[1])
    with pytest.raises(TypeError, match="other"):
        tables.SCORES.rows(query_id=["q"], train_id=[1], score=[0.5], other=[1])


def test_a_flipped_byte_is_noticed_by_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    commit_table(path, scores([("q", n, n * 0.7) for n in range(5000)]), tables.SCORES, key=KEY, started=0.0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .* `fastgda verify`"):
        tables.read(path, tables.SCORES)


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: table.name)
def test_columns_that_came_later_say_what_earlier_files_have(table: Table) -> None:
    assert table.oldest <= table.version
    for name, added in table.added.items():
        assert table.oldest < added.version <= table.version
        field = table.schema.field(name)
        assert field.nullable if added.default is None else pa.scalar(added.default, field.type).is_valid


def test_whatever_is_known_of_a_score_is_known_of_a_ranked_pair() -> None:
    """The large files of a finished run serve both views."""
    shared = [tables.RANKS.schema.field(name) for name in tables.SCORES.schema.names]
    assert shared == list(tables.SCORES.schema)
    assert tables.SCORES.added.keys() <= tables.RANKS.added.keys()


ENDING = """
import os, sys
from pathlib import Path
import pyarrow.dataset  # before threads start, none of which a fork takes along
from storage_schemas import tables

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

codes, running = [], []
for _ in range(24):
    child = os.fork()
    if not child:
        tables.read(Path(sys.argv[1]), tables.SAMPLES, columns=["key"])
        sys.exit()
    running.append(child)
    if len(running) == 4:
        codes.append(ended(running.pop(0)))
print(sorted({*codes, *map(ended, running)}))
"""


def test_a_script_that_ends_right_after_it_read_a_table_ends_well(tmp_path: Path) -> None:
    """One in ten once died, as a thread of Arrow waited for Python's lock to give a file back."""
    path = tmp_path / "samples.parquet"
    rows = pa.Table.from_pylist([sample(0, ["a"])], schema=tables.SAMPLES.schema)
    commit_table(path, rows, tables.SAMPLES, key=KEY, started=time.monotonic())

    done = subprocess.run([sys.executable, "-c", ENDING, path], capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == ("[0]\n", "")


def test_columns_of_an_object_are_read_in_the_thread_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    path = any_path(f"memory://{uuid.uuid4().hex}") / "samples.parquet"
    rows = pa.Table.from_pylist([sample(0, ["a"]), sample(1, ["b", "c"])], schema=tables.SAMPLES.schema)
    commit_table(path, rows, tables.SAMPLES, key=KEY, started=time.monotonic())
    readers: set[threading.Thread] = set()

    def read(file: MemoryFile, size: int = -1) -> bytes:
        readers.add(threading.current_thread())
        return io.BytesIO.read(file, size)

    monkeypatch.setattr(MemoryFile, "read", read, raising=False)

    assert tables.read(path, tables.SAMPLES, columns=["captions"])["captions"].to_pylist() == [["a"], ["b", "c"]]
    assert readers == {threading.current_thread()}
    assert tables.read(path, tables.SAMPLES, pc.field("train_id") == 1, columns=["key"])["key"].to_pylist() == ["s1"]
