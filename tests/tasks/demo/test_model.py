"""How the demo's denoiser is made, with a few images and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgda_core.diffusion.training import DenoiserTraining
from tasks.config.inputs import QueriesConfig, SplitConfig
from tasks.demo.model import GRID_CELL, train_denoiser_on, write_sample_grid
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
