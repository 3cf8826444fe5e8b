"""The key of all data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import tables
from storage_schemas.table import Table
from tasks.inputs.samples import _content_key, samples_artifact
from tests.storage_schemas.workspaces import with_column, write_table

CAPTIONS = [["a cat", 'said "no"\\'], ["two\nlines\t\x00\x1f"], ["a 👩🏽‍🚀 in 宇宙\u2028\x7f"], ["", "x" * 70_000]]


def rows(captions: list[list[str]], tar: str = "a.tar") -> list[dict[str, object]]:
    return [
        {
            "train_id": number,
            "key": f'k"{number}',
            "shard": tar,
            "offset": 512,
            "size": 9,
            "captions": several,
            "width": 8,
            "height": 8,
            "image_sha256": hashlib.sha256(str(number).encode()).hexdigest(),
        }
        for number, several in enumerate(captions)
    ]


def expected(captions: list[list[str]]) -> str:
    """The definition, without Arrow."""
    digest = hashlib.sha256()
    for row in rows(captions):
        values = [row["key"], row["captions"], row["image_sha256"]]
        digest.update((json.dumps(values, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()[:16]


def table(captions: list[list[str]]) -> pa.Table:
    return pa.Table.from_pylist(rows(captions), schema=tables.SAMPLES.schema)


def test_the_key_of_the_samples_is_that_of_their_json_lines() -> None:
    assert _content_key([table(CAPTIONS)]) == expected(CAPTIONS) == "90b8610326350008"


@settings(max_examples=60)
@given(st.lists(st.lists(st.text(), min_size=1, max_size=3), min_size=1, max_size=5), st.integers(0, 4))
def test_it_is_so_for_any_captions_however_the_rows_lie_in_memory(captions: list[list[str]], cut: int) -> None:
    whole = table(captions)
    pieces = [whole.slice(0, cut), whole.slice(cut)]
    keys = {_content_key(blocks) for blocks in ([whole], pieces, [pa.concat_tables(pieces)])}
    assert keys == {expected(captions)}


@pytest.mark.parametrize("later", [False, True], ids=["this release", "a column more"])
def test_neither_the_place_of_the_tars_nor_the_version_of_the_table_changes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    written: Table = with_column(tables.SAMPLES, "new", pa.int32(), 7) if later else tables.SAMPLES
    monkeypatch.setattr(tables, "SAMPLES", written)
    moved = [row | ({"new": 5} if later else {}) for row in rows(CAPTIONS, "elsewhere/a.tar")]
    assert samples_artifact(write_table(tmp_path / "samples.parquet", written, moved)).key == expected(CAPTIONS)
