"""Whole pipelines of tiny models of every architecture, and of a LoRA, from tars to one answer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgda_core.diffusion.architectures.registry import ARCHITECTURES
from fastgda_core.diffusion.folder import read_index
from fastgda_core.diffusion.model import load_model
from storage_schemas import tables
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.serving.attributor import Attributor
from tests import model_folders
from tests.adapters import lora_tensors, save_lora
from tests.tasks.whole_runs import SAMPLES, configuration, whole_run

LORA = "sd with a LoRA"
QUICK = ("sd3", LORA)  # the others are run with `make slow`


def config_of(folder: Path, name: str) -> PipelineConfig:
    """First-order scores of images that the tiny model did not make, with sketches, as large as they have to be."""
    torch.manual_seed(0)
    model = model_folders.SAVE["sd" if name == LORA else name](folder / "model")
    teacher = {"name": "abu_plus_first_order", "alpha": 1e-4, "timesteps": 2, "gradient_pairs": 4, "shard_samples": 16}
    if name == LORA:
        teacher["layers"] = "lora"
    config = configuration(
        folder, model, teacher=teacher, curvature={"samples": 8}, sketches={}, self_consistency=None
    )
    changes: dict[str, object] = {}
    if name == LORA:
        base = load_model(model, torch.device("cpu"))
        changes["adapter"] = save_lora(folder / "lora", lora_tensors(base.denoiser))
    if name == "flux":
        changes["resolution"] = 16  # its config names none
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def test_every_architecture_is_run() -> None:
    """A new one has to be among `SAVE`, of which all are run below."""


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in (*model_folders.SAVE, LORA)],
)
def test_tars_become_an_answer(tmp_path: Path, name: str) -> None:
    done = whole_run(config_of(tmp_path, name))
    scores = [tables.read(path, tables.SCORES) for path in sorted(done.workspace.scores(done.run.name).glob("*.parquet"))]
    values = torch.cat([torch.from_numpy(each["score"].to_numpy().copy()) for each in scores])
    queries = done.run.artifacts["queries"].rows
    assert len(values) == queries * SAMPLES and values.isfinite().all()
    assert len(values.unique()) > 0.9 * len(values), "scores that are all alike say nothing"
    curvature = {made.artifact.name: made.artifact for made in done.curation.made}
    assert {"latents", "curvature", "unlearning steps", "teacher scores", "sketches"} <= set(curvature)
    attributor = Attributor(Workspace.at(done.config.workspace))
    picture = io.BytesIO()
    Image.new("RGB", (24, 24), "red").save(picture, "PNG")
    for tier in ("fast", "sketch"):
        answer = attributor.attribute(picture.getvalue(), caption="a red circle", k=5, tier=tier)
        assert len(answer.matches) == 5 and len({match.train_id for match in answer.matches}) == 5
