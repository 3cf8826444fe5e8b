from __future__ import annotations

import os

os.environ.update(PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"  # pytest takes back the filter of tasks/logs.py

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for each

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # machines are noisy
settings.load_profile("patient")

# torch and diffusers take seconds to import: the process that hands tests out to others is spared them.
if TYPE_CHECKING:
    from fastgda_core.diffusion.model import DiffusionModel


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for a Prefect server is no unit test."""
    for item in items:
        if "home" in getattr(item, "fixturenames", ()):
            item.add_marker("integration")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable-Diffusion-shaped folder of random weights."""
    from tests import tiny

    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Prefect keeps its state during the tests, with a server that commands share, as its start takes seconds."""
    from flows.commands.own_server import SETTINGS
    from tests.prefect_processes import prefect_server

    folder = tmp_path_factory.mktemp("home")
    with prefect_server(folder / "server", settings=SETTINGS) as server:
        (folder / "server_url").write_text(server.url)
        yield folder


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of an object store."""
    from tests.object_store import s3_server

    with s3_server() as url:
        yield url


@pytest.fixture
def tiny_model(model_folder: Path) -> DiffusionModel:
    import torch

    from fastgda_core.diffusion.model import load_model

    return load_model(model_folder, torch.device("cpu"))
