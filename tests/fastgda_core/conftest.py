from __future__ import annotations

import pytest
import torch

from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.teachers.gradients import cross_attention_kv_layers
from fastgda_core.teachers.training_loss import SampleBlock

CAPTIONS = (
    "a red circle",
    "one round red thing",
    "blue square",
    "green cross on white",
    "two crossed green lines",
    "orange",
    "a purple square number six",
    "teal circle",
    "black cross",
    "dark crossed lines",
)
OWNER = (0, 0, 1, 2, 2, 3, 4, 5, 6, 6)
CAPTION_NUMBER = (0, 1, 0, 0, 1, 0, 0, 0, 0, 1)
TRAIN_IDS = (3, 11, 4, 70_000, 2**33 + 3, 5, 8)


def make_block(model: DiffusionModel) -> SampleBlock:
    """Seven samples of random latents; three of them have two captions."""
    generator = torch.Generator().manual_seed(1)
    return SampleBlock(
        train_ids=torch.tensor(TRAIN_IDS),
        latents=torch.randn(len(TRAIN_IDS), *model.latent_shape, generator=generator),
        text=model.encode_captions(list(CAPTIONS)),
        owner=torch.tensor(OWNER),
        caption_number=torch.tensor(CAPTION_NUMBER),
    )


@pytest.fixture
def block(tiny_model: DiffusionModel) -> SampleBlock:
    return make_block(tiny_model)


@pytest.fixture
def plan() -> NoisePlan:
    return NoisePlan(seed=5, timesteps=4, draws=2)


@pytest.fixture
def updates(tiny_model: DiffusionModel) -> dict[str, torch.Tensor]:
    """Random weight changes of three queries, by layer, each as large as the layer's weights."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(3, *layer.weight.shape, generator=generator) * layer.weight.std()
        for name, layer in cross_attention_kv_layers(tiny_model.unet).items()
    }
