from __future__ import annotations

import os

os.environ.update(PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

from pathlib import Path

import pytest
import torch

from fastgda_core.diffusion.model import DiffusionModel, load_model
from tests import tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable-Diffusion-shaped folder of random weights."""
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Prefect keeps its state during the tests."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def tiny_model(model_folder: Path) -> DiffusionModel:
    return load_model(model_folder, torch.device("cpu"))
