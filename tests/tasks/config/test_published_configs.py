"""The configurations of the paper's experiments: checked, and planned before model, images and queries are there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fastgda_core.curvature.layers import select_layers
from fastgda_core.errors import UsageError
from tasks.config.files import load_config
from tasks.config.inputs import SplitConfig
from tasks.config.pipeline import PipelineConfig
from tasks.execution.estimate import Estimate, estimate
from tasks.execution.known import MODELS
from tasks.inputs.tars import find_shards, scan

DEPLOYMENTS = Path(__file__).parents[3] / "deployments"
NAMES = ("mscoco", "mscoco_amortised", "sd14_laion", "sd14_laion_amortised")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder with nothing but the configurations."""
    for name in NAMES:
        shutil.copy(DEPLOYMENTS / f"{name}.yaml", tmp_path)
    return tmp_path


def planned(folder: Path, name: str) -> tuple[PipelineConfig, Estimate]:
    config = load_config(folder / f"{name}.yaml")
    return config, estimate(config)


def test_every_published_config_is_planned_before_anything_is_there_and_nothing_is_written(alone: Path) -> None:
    before = sorted(alone.iterdir())
    for name in NAMES:
        config, found = planned(alone, name)
        told = "\n".join(str(line) for line in found.shown())
        assert len(found.unseen) == (4 if config.candidates.index else 3)
        assert not found.refused
        for missing in (config.model.folder, config.data.shards, config.queries.pattern):
            assert f"not looked at: the {'model' if missing == config.model.folder else ''}" in told
            assert str(missing) in told
        assert {way.name for way in found.ways} == {"exact", "first order", "sketch"}
        assert all(way.forwards and way.read_bytes and way.written_bytes and way.seconds for way in found.ways)
    assert sorted(alone.iterdir()) == before


def test_the_forwards_of_the_paper_s_runs_are_their_products(alone: Path) -> None:
    config, found = planned(alone, "mscoco")
    assert isinstance(config.queries.split, SplitConfig) and config.queries.split.total == 4900 + 100 + 110
    forwards = {kind.kind: kind.forwards for kind in found.kinds}
    assert forwards["scores"] == 5110 * 10_000 * 20 * 5 * 2, "timesteps, captions, mirrored images"
    assert forwards["base losses"] == 118_287 * 20 * 5 * 2
    assert forwards["unlearning steps"] == pytest.approx(5110 * 50_000 * 2.1)
    config, found = planned(alone, "sd14_laion")
    assert isinstance(config.queries.split, SplitConfig) and config.queries.split.total == 5000 + 50 + 140
    forwards = {kind.kind: kind.forwards for kind in found.kinds}
    assert forwards["scores"] == 5190 * 20_000 * 10
    assert (config.candidates.k, config.candidates.scored) == (100_000, 20_000)
    assert config.teacher.training_size == 400_000_000


def test_hours_are_flops_by_the_measured_speed_and_cost_is_hours_by_the_price(alone: Path) -> None:
    _, found = planned(alone, "sd14_laion")
    total = sum(kind.forwards for kind in found.kinds) * MODELS["sd14"].flops
    assert found.device_hours == pytest.approx(total / 25.5e12 / 3600)
    config = load_config(alone / "sd14_laion.yaml")
    execution = config.execution.model_copy(update={"price_per_device_hour": 2.0})
    priced = estimate(config.model_copy(update={"execution": execution}), "paper")
    assert priced.as_json()["cost"] == pytest.approx(2 * total / 15.5e12 / 3600)
    with pytest.raises(UsageError, match="measured are h100, paper, cpu2"):
        estimate(config, "h99")


def test_folders_of_diffusiondb_become_queries_by_the_documented_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "diffusiondb" / "part-000001"
    folder.mkdir(parents=True)
    (tmp_path / "queries").mkdir()
    names = [f"{number}f1b.png" for number in range(3)]
    for name in names:
        Image.new("RGB", (16, 16), "red").save(folder / name)
    prompts = {name: {"p": f"a castle, {name}", "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for name in names}
    (folder / "part-000001.json").write_text(json.dumps(prompts))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", (DEPLOYMENTS.parent / "docs" / "scale.md").read_text(), re.M | re.S)
    exec(block, {})
    found, rejected = scan(find_shards(str(tmp_path / "queries" / "*.tar"), "queries.shards"), lambda: None)
    assert not rejected
    assert [sample.captions for sample in found] == [[prompts[name]["p"]] for name in names]


def test_neighbours_among_more_samples_than_memory_holds_are_refused_and_a_plan_says_so(alone: Path) -> None:
    config = load_config(alone / "sd14_laion.yaml")
    assert config.expected is not None
    expected = config.expected.model_copy(update={"samples": 10**12})
    many = config.model_copy(update={"expected": expected})
    assert not estimate(many).refused, "an index names them"
    without = config.candidates.model_copy(update={"index": None})
    found = estimate(many.model_copy(update={"candidates": without}))
    assert (
        "neighbours in a matrix in memory: the features of 1,000,000,000,000 samples take 2,048,000 GB" in found.refused
    )
    assert any(str(line).startswith("a run is refused here: candidates.policy top_k") for line in found.shown())
    assert not planned(alone, "mscoco")[1].refused


def test_a_plan_without_expectations_still_asks_for_the_model(alone: Path) -> None:
    config = load_config(alone / "mscoco.yaml").model_copy(update={"expected": None})
    with pytest.raises(UsageError, match="does not exist"):
        estimate(config)


def test_the_kept_count_of_a_forward_is_that_of_hooks_on_its_layers() -> None:
    """Two FLOPs for each weight and each position that it is applied at, and attention's two products beside them."""
    shape, found = MODELS["fastgda_coco"], 0

    def count(layer: torch.nn.Module, _given: object, made: torch.Tensor) -> None:
        nonlocal found
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        positions = made.numel() // weight.shape[0]
        found += 2 * weight.numel() * positions

    with torch.device("meta"):
        blocks = {"block_out_channels": (128, 256, 256, 256), "cross_attention_dim": 1024}
        denoiser = UNet2DConditionModel(sample_size=16, attention_head_dim=8, **blocks)
        for module in denoiser.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.register_forward_hook(count)
        denoiser(torch.empty(1, 4, 16, 16), torch.empty(1), torch.empty(1, 77, 1024))
    assert found < shape.flops < 1.1 * found
    matrices = [layer.weight.numel() for layer in select_layers(denoiser, "cross-attn-kv").values()]
    assert shape.layer_weights == sum(matrices)
