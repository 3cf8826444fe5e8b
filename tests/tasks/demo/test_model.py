"""How the demo's denoiser is made, with a few images and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgda_core.diffusion.checkpoints import check_checkpoint
from fastgda_core.diffusion.model import load_model
from fastgda_core.diffusion.training import CaptionedLatents, DenoiserTrainer, DenoiserTraining
from fastgda_core.evaluation.retraining import to_train
from tasks.config.files import load_config
from tasks.config.inputs import QueriesConfig, SplitConfig
from tasks.config.judging import JudgeConfig
from tasks.demo import judge_world
from tasks.demo.model import GRID_CELL, checkpoint_folder, train_denoiser_on, write_sample_grid
from tasks.demo.openmoji import write_model_folder
from tasks.inputs.tars import find_shards, read_image, scan
from tests import tiny


def weights(assets: Path) -> torch.Tensor:
    found = load_file(assets / "unet" / "diffusion_pytorch_model.safetensors")
    return torch.cat([found[name].float().flatten() for name in sorted(found)])


@pytest.mark.integration
def test_a_denoiser_is_trained_goes_on_from_another_and_paints(tmp_path: Path) -> None:
    shards, first, second, other = (tmp_path / name for name in ("shards", "first", "second", "other"))
    tiny.write_tar(shards / "0.tar", tiny.sample_members(range(8)))
    train_denoiser_on(shards, first, DenoiserTraining(steps=2), None)
    train_denoiser_on(shards, second, DenoiserTraining(steps=2, warmup_steps=1, seed=1), first)
    train_denoiser_on(shards, other, DenoiserTraining(steps=2, seed=1), None)
    near, far = ((weights(second) - weights(assets)).norm() for assets in (first, other))
    assert 0 < near < far / 10
    captions = ["a red circle", "a blue cross", "a teal square"]
    queries = QueriesConfig(captions=captions, split=SplitConfig(train=1, validation=1, test=1), steps=2)
    with Image.open(write_sample_grid(second, queries)) as grid:
        assert grid.height == GRID_CELL and len(grid.getcolors(grid.width * grid.height)) > 10


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.integration
def test_weights_on_the_way_are_kept_and_change_nothing(tmp_path: Path) -> None:
    shards, plain, kept = (tmp_path / name for name in ("shards", "plain", "kept"))
    tiny.write_tar(shards / "0.tar", tiny.sample_members(range(8)))
    training = DenoiserTraining(steps=4, warmup_steps=1, batch_size=4)
    train_denoiser_on(shards, plain, training, None)
    train_denoiser_on(shards, kept, training, None, [0.5, 0.25])
    assert torch.equal(weights(kept), weights(plain))
    for share in (0.25, 0.5):
        folder = checkpoint_folder(kept, share)
        check_checkpoint(folder, kept_as_model(kept, tmp_path / f"model {share}"))
        assert not torch.equal(weights(folder), weights(kept))


def kept_as_model(assets: Path, folder: Path) -> Path:
    write_model_folder(folder, assets)
    return folder


@pytest.mark.integration
def test_the_judges_world_keeps_what_its_recipe_passes_through(tmp_path: Path) -> None:
    """Bit for bit the averaged weights of the judge's own training, stopped there."""
    shards, folder = tmp_path / "shards", tmp_path / "world"
    tiny.write_tar(shards / "0.tar", tiny.sample_members(range(8)))
    (shards / "ORIGIN.txt").write_text("eight pictures\n")
    recipe = {"steps": 8, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-2}
    judge = JudgeConfig.model_validate({"retrain": recipe, "subsets": 3, "again": 0})
    judge_world.write_model(folder, shards, judge)
    model = load_model(folder, torch.device("cpu"))
    samples, _ = scan(find_shards(str(shards / "*.tar"), "shards"), lambda: None)
    images = [read_image(sample.shard, sample.offset, sample.size) for sample in samples]
    data = CaptionedLatents.of(model, model.encode_images(images), [sample.captions for sample in samples])
    denoiser = to_train(model, seed=judge.seed, continued=False)
    trainer = DenoiserTrainer(
        denoiser, model.schedule, data, DenoiserTraining(**judge.retrain.hyperparameters, seed=judge.seed)
    )
    for share, step in ((0.125, 1), (0.25, 2), (0.5, 4), (1.0, 8)):
        expected = trainer.run(until=step).state_dict()
        found = state(folder if share == 1 else checkpoint_folder(folder, share))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    before = (folder / "ORIGIN.txt").stat().st_mtime_ns
    judge_world.write_model(folder, shards, judge)
    assert (folder / "ORIGIN.txt").stat().st_mtime_ns == before, "complete, so it is left as it is"


def test_the_configs_of_the_judges_world_ask_the_same_of_it() -> None:
    """So that the models which were trained again for one are there for the others."""
    configs = judge_world.CONFIG, judge_world.TIERS_CONFIG, judge_world.RIVALS_CONFIG
    first, tiers, rivals = map(load_config, configs)
    for section in ("data", "model", "queries", "features", "curvature", "candidates"):
        assert getattr(first, section) == getattr(tiers, section) == getattr(rivals, section)
    assert rivals.judge is not None and rivals.judge.model_copy(update={"rivals": {}}) == first.judge
    assert rivals.teacher == first.teacher
    assert (
        first.judge is not None
        and first.judge.model_copy(update={"leave_out": None, "regenerate": False}) == tiers.judge
    )
    assert set(tiers.teacher.checkpoints) <= {
        judge_world.CONFIG.parent / "model" / "checkpoints" / f"{share:g}" for share in judge_world.KEPT
    }
