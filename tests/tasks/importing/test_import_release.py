"""A release's folder, imported as it lies, evaluated, trained on, indexed, asked, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from storage_schemas.snapshots.published import read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.flows.pipeline_case import fastgda
from tests.tasks.importing.release_world import (
    CANDIDATES,
    SAMPLES,
    TEST,
    TRAIN,
    World,
    forward,
    make_world,
    mean_average_precision,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    return make_world(tmp_path_factory.mktemp("release"), model_folder)


@pytest.fixture(scope="module")
def imported(world: World, tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """A folder with the configuration and the workspace of an import."""
    folder = tmp_path_factory.mktemp("imported")
    said = fastgda(
        "import-release", world.root, "--workspace", folder / "workspace", "--config-file", folder / "release.yaml",
        "--pipeline", world.pipeline, "--encoders", world.encoders, home=home,
    ).stdout  # fmt: skip
    assert "evaluate" in said and "no new queries" not in said
    return folder


def test_evaluate_gives_the_map_of_its_head(world: World, imported: Path, home: Path) -> None:
    said = fastgda("evaluate", imported / "release.yaml", home=home).stdout
    assert "promoted" in said
    phi = world.phi
    samples = forward(world.head, phi["data_feats"])
    spaces = {
        "tuned": forward(world.head, phi["test_query_feats"]) @ samples.T,
        "untuned": phi["test_query_feats"] @ (phi["data_feats"] / np.linalg.norm(phi["data_feats"], axis=1)[:, None]).T,
    }
    cutoffs = yaml.safe_load((imported / "release.yaml").read_text())["evaluation"]["cutoffs"]
    for space, similarity in spaces.items():
        for cutoff in cutoffs:
            statement = f"SELECT value FROM metrics WHERE metric='mAP' AND space='{space}' AND cutoff={cutoff}"
            (found,) = query(imported / "workspace", statement)["value"].to_pylist()
            assert found == pytest.approx(mean_average_precision(world.test, similarity, cutoff), abs=1e-6)
