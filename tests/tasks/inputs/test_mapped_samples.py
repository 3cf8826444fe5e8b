"""Large tables of samples are mapped, and hold what the tables hold that are read."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from storage_schemas import tables
from storage_schemas.commit import commit_table
from storage_schemas.files import AnyPath, any_path
from tasks.inputs import mapped_samples
from tasks.inputs.mapped_samples import map_samples
from tasks.inputs.samples import rows_of_samples, samples_table
from tests.storage_schemas.test_tables import sample

KEY = "0123456789abcdef"
OTHER = "fedcba9876543210"


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_samples, "MAPPED_FROM", 10)
    monkeypatch.setattr(mapped_samples, "CHUNK_ROWS", 4)
    monkeypatch.setattr(tables, "SAMPLES", replace(tables.SAMPLES, row_group_rows=3))


def written(path: AnyPath, count: int, key: str = KEY) -> AnyPath:
    rows = pa.Table.from_pylist(
        [sample(number, [f"caption {number}"] * (1 + number % 3)) for number in range(count)],
        schema=tables.SAMPLES.schema,
    )
    commit_table(path, rows, tables.SAMPLES, key=key, started=0.0)
    return path


@pytest.fixture(params=["disk", "store"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnyPath:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = any_path(tmp_path / "samples" if request.param == "disk" else f"memory://{uuid.uuid4()}")
    return written(folder / "samples.parquet", 25)


def test_a_mapped_table_holds_the_same_rows(path: AnyPath, tmp_path: Path) -> None:
    mapped = map_samples(path)
    assert mapped is not None and mapped.equals(tables.read(path, tables.SAMPLES))
    assert samples_table(path)["captions"].take([24, 0]).to_pylist() == [["caption 24"], ["caption 0"]]
    assert [len(chunk) for chunk in mapped["key"].chunks] == [6, 6, 6, 6, 1]
    (file,) = tmp_path.rglob("*.arrow")
    before = file.stat()
    assert map_samples(path) is not None
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_a_table_that_was_made_again_is_mapped_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "samples" / "samples.parquet", 12)
    first = map_samples(path)
    again = map_samples(written(path, 15, OTHER))
    assert first is not None and again is not None
    assert (first.num_rows, again.num_rows) == (12, 15)


def test_a_few_samples_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "samples" / "samples.parquet", 9)
    assert map_samples(path) is None
    assert samples_table(path).num_rows == 9
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize("numbers", [[], [7], [24, 0, 13, 13, 1, 12, 2]])
def test_rows_are_those_asked_for_in_the_order_given(path: AnyPath, numbers: list[int]) -> None:
    rows = rows_of_samples(path, numbers, ["captions", "train_id"])
    assert rows["captions"].to_pylist() == [[f"caption {number}"] * (1 + number % 3) for number in numbers]
    assert rows["train_id"].to_pylist() == numbers


def test_no_row_is_given_for_one_that_does_not_exist(path: AnyPath) -> None:
    with pytest.raises(IndexError):
        rows_of_samples(path, [0, 25], ["captions"])
