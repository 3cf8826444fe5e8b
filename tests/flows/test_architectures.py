"""Whole pipelines of tiny models of every architecture, and of a LoRA, from tars to one answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgda_core.diffusion.model import load_model
from storage_schemas import tables
from tasks.config.pipeline import PipelineConfig
from tasks.serving.answers import Tier
from tasks.serving.attributor import Attributor
from tests import model_folders, tiny
from tests.adapters import lora_tensors, save_lora
from tests.model_folders import LABELS
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
    config = configuration(folder, model, teacher=teacher, curvature={"samples": 8}, sketches={}, self_consistency=None)
    changes: dict[str, object] = {}
    if name == "dit":  # captions are names of its classes
        for tar, count in {"shapes": SAMPLES, "queries": 8}.items():
            members = [(n, caption if n.endswith(".txt") else c) for n, c, caption in labelled(count)]
            tiny.write_tar(folder / f"{tar}.tar", members)
    if name == LORA:
        base = load_model(model, torch.device("cpu"))
        changes["adapter"] = save_lora(folder / "lora", lora_tensors(base.denoiser))
    if name == "flux":
        changes["resolution"] = 16  # its config names none
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def labelled(count: int) -> list[tuple[str, bytes, bytes]]:
    """Members of a tar, each with the name of a class beside it."""
    names = [name.partition(",")[0] for name in LABELS.values()]
    members = tiny.sample_members(range(count))
    return [(name, content, names[place // 2 % len(names)].encode()) for place, (name, content) in enumerate(members)]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in (*model_folders.SAVE, LORA)],
)
def test_tars_become_an_answer(tmp_path: Path, name: str) -> None:
    done = whole_run(config_of(tmp_path, name))
    scores = [
        tables.read(path, tables.SCORES) for path in sorted(done.workspace.scores(done.run.name).glob("*.parquet"))
    ]
    values = torch.cat([torch.from_numpy(each["score"].to_numpy().copy()) for each in scores])
    queries = done.run.artifacts["queries"].rows
    assert len(values) == queries * SAMPLES and values.isfinite().all()
    assert len(values.unique()) > 0.9 * len(values), "scores that are all alike say nothing"
    assert {"latents", "curvature", "unlearning steps", "sketches"} <= {
        each.artifact.name for each in done.curation.made
    }
    service, picture = Attributor(done.workspace), Image.new("RGB", (24, 24), "red")
    tiers: tuple[Tier, ...] = ("fast", "sketch")
    for tier in tiers:
        hits = service.attribute(picture, LABELS["2"], k=5, tier=tier).hits
        assert len({hit.train_id for hit in hits}) == 5
