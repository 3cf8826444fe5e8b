from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastgda_core.diffusion.model import DiffusionModel, load_model


@pytest.fixture(scope="session")
def card() -> torch.device:
    """The device that is compared with the CPU; the tests' own logic can be looked at without one."""
    return torch.device(os.environ.get("FASTGDA_GPU_TESTS_ON", "cuda"))


@pytest.fixture
def card_model(model_folder: Path, card: torch.device) -> DiffusionModel:
    return load_model(model_folder, card)
