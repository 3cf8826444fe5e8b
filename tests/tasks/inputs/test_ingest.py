"""What ingestion writes, and images that are decoded ahead of whoever needs them."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from fastgda_core.images import AHEAD, in_threads
from storage_schemas import tables
from storage_schemas.commit import commit_table
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs.samples import ingest_samples, readable_images, readable_images_ahead
from tests import tiny
from tests.storage_schemas.workspaces import first_version
from tests.tasks.configs import document


def context(tmp_path: Path, workspace: str) -> Context:
    changes = {"data__shards": str(tmp_path / "*.tar"), "features": {"space": "pixel"}}
    return Context(PipelineConfig.model_validate(document(workspace=str(tmp_path / workspace), **changes)), "model")


def test_rejections_are_the_same_in_identical_runs_and_can_be_grouped(tmp_path: Path) -> None:
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, "GIF")
    strange = {"a": b"no image", "b": b"", "c": gif.getvalue(), "d": tiny.draw(1)[0][:100]}
    members = [(f"{key}.jpg", image) for key, image in strange.items()] + [(f"{key}.txt", b"x") for key in strange]
    tiny.write_tar(tmp_path / "data.tar", [*tiny.sample_members(range(2)), *members])
    files = []
    for workspace in ("one", "two"):
        where = context(tmp_path, workspace)
        ingest_samples.fn(where)
        (path,) = where.workspace.root.rglob("rejected.parquet")
        files.append(path.read_bytes())
        reasons = tables.read(path, tables.REJECTED_SAMPLES)["reason"].to_pylist()
        assert len(reasons) == 4 and len(set(reasons[:3])) == 1 and "0x" not in "".join(reasons)
    assert files[0] == files[1]


def test_a_table_of_an_earlier_release_says_what_it_lacks_and_is_whole_when_the_tars_are_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_tar(tmp_path / "data.tar", tiny.sample_members(range(3)))
    where = context(tmp_path, "one")
    made = ingest_samples.fn(where).artifact
    whole, before = tables.read(made.path, tables.SAMPLES), first_version(tables.SAMPLES)
    key, folder = made.path.parent.name, where.workspace.root / "samples" / made.path.parent.name
    assert isinstance(made.path, Path) and isinstance(folder, Path)
    made.path.unlink()
    commit_table(made.path, whole.select(before.schema.names), before, key=key, started=time.monotonic())
    capsys.readouterr()

    assert ingest_samples.fn(where).reused
    said = " ".join(capsys.readouterr().err.split())
    assert f"{folder} was indexed by an earlier release" in said and "delete that folder" in said
    shutil.rmtree(folder)
    again = ingest_samples.fn(where)
    assert not again.reused and again.artifact == made and tables.read(made.path, tables.SAMPLES) == whole
    assert "earlier release" not in capsys.readouterr().err


def test_images_that_are_decoded_ahead_are_the_same_in_order_with_the_same_faults(tmp_path: Path) -> None:
    tar = tiny.write_tar(tmp_path / "data.tar", tiny.sample_members(range(23)))
    samples = ingest_samples.fn(context(tmp_path, "one")).artifact
    whole, rotten = tar.read_bytes(), tiny.draw(9)[0]
    tar.write_bytes(whole.replace(rotten, rotten[:50] + bytes(len(rotten) - 50)))
    images, faults = readable_images(samples.path, list(range(23)))
    assert faults.keys() == {9}
    for size in (1, 4, 23, 100):
        batches = list(readable_images_ahead(samples.path, list(range(23)), size))
        assert [len(several) for several, _ in batches] == [min(size, 23 - start) for start in range(0, 23, size)]
        found = [image.tobytes() for several, _ in batches for image in several]
        assert found == [image.tobytes() for image in images]
        assert {number: why for _, several in batches for number, why in several.items()} == faults
        assert [bool(several) for _, several in batches] == [start <= 9 < start + size for start in range(0, 23, size)]


def test_threads_work_ahead_but_not_far_and_end_when_nobody_asks_any_more() -> None:
    begun: list[int] = []
    batches = in_threads(lambda item: begun.append(item) or -item, range(1000), 10)
    assert next(batches) == [-item for item in range(10)]
    time.sleep(0.2)
    assert 10 < len(begun) <= 10 + AHEAD
    batches.close()
    assert len(begun) <= 10 + AHEAD

    def fails(item: int) -> int:
        if item == 15:
            raise OSError("gone")
        return item

    failing = in_threads(fails, range(100), 10)
    assert next(failing) == list(range(10))
    with pytest.raises(OSError, match="gone"):
        next(failing)
