"""Make `workspace-<release>.tar.xz`: a small data set, model, configuration and the workspace of its finished run.

    unshare --uts sh -c 'hostname example && python -m tests.compatibility.make_workspace'

Once for each release that changes what is on disk; those of earlier ones stay. `expected.json` says what it answers.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tasks.serving.attributor import Attributor
from tests import tiny
from tests.flows.pipeline_case import fastgda, lay_out

PLACE = Path("/srv/shapes")  # paths of it stand in the files, so it is nobody's folder
SAMPLES, QUESTION = 48, (3, "a blue circle")


def answer(workspace: Path) -> list[int]:
    """The training samples that are named for a picture."""
    number, caption = QUESTION
    picture = Image.open(io.BytesIO(tiny.draw(number)[0])).convert("RGB")
    found = Attributor(Workspace.at(workspace)).attribute(picture, caption, 5)
    return [each.train_id for each in found.hits]


def lay_out_here(folder: Path) -> Path:
    """The configuration that was run."""
    return lay_out(
        folder,
        tiny.save_model(folder / "model"),
        samples=SAMPLES,
        model__folder="model",
        features={"space": "minilm_text"},
        queries__twins=1,
        exact_check={"queries": 1, "candidates": 4},
        # Steps of no length leave the zeros and ones of the first weights, which take no room in an archive.
        head={"epochs": 1, "initialization": "features", "learning_rate": 1e-30},
    )


def main() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    config = lay_out_here(PLACE)
    with tempfile.TemporaryDirectory() as home:
        fastgda("run", config, home=Path(home))
    workspace = PLACE / "workspace"
    scores = query(workspace, "SELECT query_id, train_id, score FROM scores ORDER BY ALL").to_pylist()
    expected = {"answer": answer(workspace), "scores": [list(row.values()) for row in scores]}
    (PLACE / "expected.json").write_text(json.dumps(expected))
    archive = Path(__file__).with_name(f"workspace-{version('fastgda')}.tar.xz")
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(PLACE, "shapes")
    print(f"{archive}: {archive.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
