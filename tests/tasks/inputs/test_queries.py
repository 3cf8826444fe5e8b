"""Query sets on disk: what is read of them, and when images are decoded."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from fastgda_core.errors import BadSample
from storage_schemas import tables
from storage_schemas.commit import commit_table
from tasks.artifact import Artifact
from tasks.inputs.queries import joined_queries, load_queries, queries_artifact, query_row
from tests.tiny import draw


def query_set(path: Path, images: dict[str, bytes]) -> Artifact:
    rows = [
        {"query_id": name, "split": "test", "caption": f"of {name}", "image": image, "image_sha256": ""}
        for name, image in images.items()
    ]
    commit_table(path, pa.Table.from_pylist(rows, schema=tables.QUERIES.schema), tables.QUERIES, key="q", started=0)
    return queries_artifact(path)


def test_names_are_read_without_decoding_an_image(tmp_path: Path) -> None:
    stage = query_set(tmp_path / "a" / "queries.parquet", {"a": b"no image", "b": draw(1)[0]})
    found = load_queries(stage)
    assert [(query.query_id, query.split, query.caption) for query in found] == [
        ("a", "test", "of a"),
        ("b", "test", "of b"),
    ]
    assert found[1].image.tobytes() == Image.open(io.BytesIO(draw(1)[0])).tobytes()
    with pytest.raises(BadSample):
        _ = found[0].image


@pytest.mark.heavy
def test_names_are_read_without_reading_the_images(tmp_path: Path) -> None:
    path = tmp_path / "a" / "queries.parquet"
    stage = query_set(path, {str(number): hashlib.shake_128(bytes([number])).digest(2**22) for number in range(16)})
    read = int(Path("/proc/self/io").read_text().split()[1])
    assert len(load_queries(stage)) == 16
    assert int(Path("/proc/self/io").read_text().split()[1]) - read < path.stat().st_size / 10


def test_a_query_set_is_held_once(tmp_path: Path) -> None:
    queries = query_set(tmp_path / "a" / "queries.parquet", {"a": draw(1)[0]})
    assert load_queries(queries) is load_queries(queries_artifact(queries.path))


def test_of_queries_of_one_name_the_last_sets_is_joined(tmp_path: Path) -> None:
    first = query_set(tmp_path / "a" / "queries.parquet", {"a": draw(1)[0], "b": draw(2)[0]})
    second = query_set(tmp_path / "b" / "queries.parquet", {"b": draw(3)[0], "c": draw(4)[0]})
    found = joined_queries([first, second])
    assert [query.query_id for query in found] == ["a", "b", "c"]
    assert found[1].image.tobytes() == load_queries(second)[0].image.tobytes()


@pytest.mark.parametrize(
    ("query_id", "name"),
    [
        *[(kept, f"{kept}.png") for kept in ("q0003", "twin-12-0123ab", "x" * 100)],
        *[(odd, None) for odd in ("a b", "a/b", "..", ".hidden", "a\nb", "x" * 300, "über/" * 60)],
    ],
)
def test_a_query_of_any_name_has_a_picture_file_of_its_own(query_id: str, name: str | None, tmp_path: Path) -> None:
    png = draw(1)[0]
    names = [query_id, query_id.replace("/", "_"), query_id + "0"]
    for number, each in enumerate(dict.fromkeys(names)):
        row = query_row(tmp_path / "set" / "queries.parquet", number, each, "test", "x", png)
        assert row["query_id"] == each and row["image"] == png
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == len(dict.fromkeys(names)) and {path.parent.name for path in tmp_path.rglob("*.png")} == {
        "images"
    }
    if name is not None:
        assert name in files
    else:
        assert any(file.startswith("00000-") for file in files) and all(file.isascii() for file in files)
