"""What ingestion writes, and images that are decoded ahead of whoever needs them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from storage_schemas import tables
from tasks.config import PipelineConfig
from tasks.context import Context
from tasks.samples import ingest_samples
from tests import tiny
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
