"""Runs that attribute a LoRA to its own training set, through the adapter's weights alone."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.model import load_model
from fastgda_core.errors import UsageError
from flows.curation import curate
from storage_schemas import tables
from storage_schemas.workspace import part
from tasks.config.pipeline import PipelineConfig
from tasks.context import open_context
from tasks.execution.estimate import estimate
from tests import tiny
from tests.adapters import lora_tensors, save_lora, train_lora
from tests.model_folders import save_dit
from tests.tasks.configs import document
from tests.tasks.whole_runs import SAMPLES, configuration
from tests.tasks.without_prefect import without_prefect

TEACHER = {
    "objective": "output_norm",
    "name": "abu_plus_first_order",
    "alpha": 1e-4,
    "timesteps": 10,
    "gradient_pairs": 100,
    "shard_samples": 16,
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> PipelineConfig:
    """A LoRA of the tiny model, trained on the first half of the samples; a run on all, whose layers nobody chose."""
    folder = tmp_path_factory.mktemp("tuned")
    drawn = [tiny.draw(number) for number in range(SAMPLES // 2)]
    base = load_model(model_folder, torch.device("cpu"))
    latents = base.encode_images([Image.open(io.BytesIO(image)) for image, _ in drawn])
    adapter = train_lora(base, model_folder, folder / "lora", latents, [caption for _, caption in drawn])
    plain = configuration(folder, model_folder, teacher=TEACHER, curvature={"samples": 32})
    whole = plain.model_dump(mode="json", exclude={"teacher"}) | {"teacher": TEACHER, "self_consistency": None}
    whole["queries"]["twins"] = 0
    whole["model"]["adapter"] = str(adapter)
    return PipelineConfig.model_validate(whole)


@pytest.mark.heavy
def test_a_lora_is_attributed_through_its_own_weights(tuned: PipelineConfig, model_folder: Path) -> None:
    """Queries are eight of its training images, and are themselves among their strongest causes."""
    with without_prefect():
        run = curate(tuned).run
    assert run.config.teacher.layers == "lora"
    model = load_model(model_folder, torch.device("cpu"), adapter=tuned.model.adapter)
    assert (
        load_file(part(run.artifacts["unlearning steps"].path, 0, "safetensors")).keys()
        >= select_layers(model.denoiser, "lora").keys()
    )
    table = tables.read_parts(run.artifacts["scores"].path, tables.SCORES)
    rows = table.sort_by([("query_id", "ascending"), ("train_id", "ascending")])
    scores = rows["score"].to_numpy().reshape(-1, SAMPLES)
    ranks = (scores > scores[np.arange(8), np.arange(8)][:, None]).sum(1)
    assert ranks.mean() < 3, ranks  # by chance: 11.5


@pytest.mark.heavy
def test_exact_scores_of_a_lora_agree_with_first_order_ones(tuned: PipelineConfig) -> None:
    found = []
    for name in ("abu_plus_first_order", "abu_plus"):
        teacher = {**tuned.teacher.model_dump(), "name": name, "layers": "lora", "shard_queries": None, "alpha": 1e-5}
        with without_prefect():
            run = curate(PipelineConfig.model_validate({**tuned.model_dump(), "teacher": teacher})).run
        table = tables.read_parts(run.artifacts["scores"].path, tables.SCORES)
        found.append(table.sort_by([("query_id", "ascending"), ("train_id", "ascending")])["score"].to_numpy())
    assert np.corrcoef(*found)[0, 1] > 0.99


def test_the_plan_says_which_layers(tuned: PipelineConfig, model_folder: Path) -> None:
    def told(config: PipelineConfig) -> str:
        return next(str(line) for line in estimate(config).shown() if "layers are" in str(line))

    tensors = lora_tensors(load_model(model_folder, torch.device("cpu")).denoiser).values()
    weights = sum(tensor.numel() for tensor in tensors)
    assert told(tuned) == f"the teacher's layers are lora: {len(tensors):,}, {weights:,} weights"
    plain = tuned.model_copy(update={"model": tuned.model.model_copy(update={"adapter": None})})
    assert "are cross-attn-kv: " in told(plain)


def test_layers_that_nobody_chose_are_the_architectures(tuned: PipelineConfig, tmp_path: Path) -> None:
    def chosen(folder: Path | None = None, adapter: Path | None = None, **teacher: object) -> str:
        model = {"folder": str(folder or tuned.model.folder), "adapter": adapter and str(adapter)}
        config = document(model=model, teacher=TEACHER | teacher)
        return open_context(PipelineConfig.model_validate(config)).config.teacher.layers

    dit = save_dit(tmp_path / "dit")
    assert chosen() == "cross-attn-kv" and chosen(dit) == "attn" and chosen(adapter=tuned.model.adapter) == "lora"
    assert chosen(dit, layers="all") == "all" and chosen(adapter=tuned.model.adapter, layers="attn") == "attn"
    rivals = {
        "retrain": {"steps": 1},
        "rivals": {"other": {"name": "tracin"}, "all of it": {"name": "tracin", "layers": "all"}},
    }
    config = PipelineConfig.model_validate(document(model__folder=str(dit), teacher=TEACHER, judge=rivals))
    found = [open_context(config.of_rival(name)).config.teacher.layers for name in ("other", "all of it")]
    assert found == ["attn", "all"]


def test_checkpoints_of_an_adapter_are_adapters(tuned: PipelineConfig, tmp_path: Path) -> None:
    base = load_model(tuned.model.folder, torch.device("cpu"))
    early = save_lora(tmp_path / "early", lora_tensors(base.denoiser, seed=1))
    teacher = tuned.teacher.model_copy(update={"checkpoints": (early,)})
    context = open_context(tuned.model_copy(update={"teacher": teacher}))
    alone = load_model(tuned.model.folder, torch.device("cpu"), adapter=early)
    layers = select_layers(alone.denoiser, "lora")
    assert all(
        torch.equal(layer.weight, layers[name].weight)
        for name, layer in context.layers(context.teacher_model()).items()
    )
    teacher = tuned.teacher.model_copy(update={"checkpoints": (tuned.model.folder,)})
    with pytest.raises(UsageError, match="lacks pytorch_lora_weights"):
        open_context(tuned.model_copy(update={"teacher": teacher}))


def test_a_model_is_named_after_its_adapter_and_resolution(tuned: PipelineConfig, tmp_path: Path) -> None:
    model = tuned.model
    assert model.adapter is not None
    plain = model.model_copy(update={"adapter": None})
    moved = Path(model.adapter).rename(tmp_path / "elsewhere")
    try:
        again = model.model_copy(update={"adapter": moved})
        small = plain.model_copy(update={"resolution": 8})
        names = [open_context(tuned.model_copy(update={"model": each})).model_hash for each in (plain, again, small)]
    finally:
        moved.rename(model.adapter)
    assert open_context(tuned).model_hash == names[1] and len(set(names)) == 3


def test_what_an_adapter_cannot_do_is_refused_before_any_work(tuned: PipelineConfig, tmp_path: Path) -> None:
    whole = document(model__adapter="lora", tail_patch={"queries": 2})
    with pytest.raises(ValidationError, match=r"tail_patch trains the whole denoiser, and the model is a LoRA"):
        PipelineConfig.model_validate(whole)
    strange = save_lora(tmp_path / "lora", {"x.lora_A.weight": torch.ones(2, 8), "x.lora_B.weight": torch.ones(8, 2)})
    config = tuned.model_copy(update={"model": tuned.model.model_copy(update={"adapter": strange})})
    with pytest.raises(UsageError, match=r"model\.adapter .* adapts x, which the model's unet does not have"):
        open_context(config)
