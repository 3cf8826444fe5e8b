from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # see tests/conftest.py
    import torch

    from fastgda_core.curvature.fisher import Fisher
    from fastgda_core.curvature.layers import Layer
    from fastgda_core.diffusion.model import DiffusionModel
    from fastgda_core.diffusion.noise import NoisePlan
    from fastgda_core.teachers.training_loss import SampleBlock


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage() -> Iterator[None]:
    """kronfluence collects garbage at each of its steps: spare it the many objects of what is imported."""
    for heavy in ("diffusers.models.unets.unet_2d_condition", "kronfluence.analyzer"):
        importlib.import_module(heavy)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def block(tiny_model: DiffusionModel) -> SampleBlock:
    from tests.fastgda_core.blocks import make_block

    return make_block(tiny_model)


@pytest.fixture
def plan() -> NoisePlan:
    from fastgda_core.diffusion.noise import NoisePlan

    return NoisePlan(seed=5, timesteps=4, draws=2)


@pytest.fixture
def layers(tiny_model: DiffusionModel) -> dict[str, Layer]:
    from fastgda_core.curvature.layers import select_layers

    return select_layers(tiny_model.denoiser, "cross-attn-kv")


@pytest.fixture
def updates(layers: dict[str, Layer]) -> dict[str, torch.Tensor]:
    from tests.fastgda_core.blocks import random_updates

    return random_updates(layers)


@pytest.fixture(scope="session")
def fishers(model_folder: Path) -> dict[str, Fisher]:
    """Both kinds, fitted to the gradients of the block's samples."""
    import torch
    from torch.utils.data import TensorDataset

    from fastgda_core.curvature.fisher import fit_fisher
    from fastgda_core.curvature.layers import select_layers
    from fastgda_core.diffusion.model import load_model
    from tests.fastgda_core.blocks import fisher_rows, make_block, summed_loss

    device = torch.device("cpu")
    model = load_model(model_folder, device)
    names = list(select_layers(model.denoiser, "cross-attn-kv"))
    dataset = TensorDataset(*fisher_rows(model, make_block(model)))
    loss = summed_loss(model)
    return {
        "diagonal": fit_fisher("diagonal", model.denoiser, names, dataset, loss, 64, device),
        "ekfac": fit_fisher("ekfac", model.denoiser, names, dataset, loss, 64, device),
    }
