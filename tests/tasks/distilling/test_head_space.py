"""A head is served wherever the weights of its encoders are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from fastgda_core.errors import UsageError
from fastgda_core.ranking.head import RankHead
from storage_schemas.heads.records import HeadRecord, as_json
from storage_schemas.workspace import Workspace
from tasks.config.inputs import FeaturesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.distilling.head_space import recorded_space, space_record
from tasks.distilling.heads import import_head
from tasks.inputs.features import weights_key
from tests.tasks.configs import document


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A DINO of a few hundred weights."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "elsewhere" / "dino")
    return tmp_path / "elsewhere" / "dino"


def test_an_imported_head_is_keyed_by_the_content_of_its_encoders_weights(tmp_path: Path, weights: Path) -> None:
    torch.save(RankHead(8).state_dict(), tmp_path / "release.pth")
    shutil.copytree(weights, tmp_path / "copy")
    versions = []
    for source in (weights, tmp_path / "copy"):
        features = {"space": "dino", "weights": {"dino": str(source)}, "unit_length": False}
        asked = document(workspace=str(tmp_path / "workspace"), features=features)
        versions.append(import_head(PipelineConfig.model_validate(asked), tmp_path / "release.pth").artifact.key)
    assert versions[0] == versions[1]


def test_weights_are_keyed_by_how_their_images_are_prepared_where_that_is_not_usual(weights: Path) -> None:
    def written(**numbers: object) -> tuple[str, str]:
        (weights / "preprocessor_config.json").write_text(json.dumps(numbers))
        return weights_key("dino", str(weights)), weights_key("clip_text", str(weights))  # the files alone

    prepared, files = written(size=224)
    assert prepared == files, "as of before the file was read"
    prepared, files = written(size=224, image_mean=[0.5, 0.5, 0.5])
    assert prepared != files


def test_weights_inside_the_workspace_move_with_it(tmp_path: Path, weights: Path) -> None:
    shutil.copytree(weights, tmp_path / "before" / "encoders" / "dino")
    space = FeaturesConfig(space="dino", weights={"dino": str(tmp_path / "before" / "encoders" / "dino")})
    text = as_json(space_record(space, Workspace.at(tmp_path / "before")))
    assert str(tmp_path).encode() not in text
    (tmp_path / "before").rename(tmp_path / "after")
    found = recorded_space(HeadRecord.model_validate_json(text), Workspace.at(tmp_path / "after"))
    assert found.weights == {"dino": str(tmp_path / "after" / "encoders" / "dino")}


def test_weights_outside_of_it_are_found_where_this_machine_has_them(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    space = FeaturesConfig(space="dino+clip", weights={"dino": str(weights), "clip": "a/hub-id"})
    record = HeadRecord.model_validate_json(as_json(space_record(space, workspace)))
    assert recorded_space(record, workspace) == space.model_copy(update={"centre": True})
    weights.parent.rename(tmp_path / "mounted")
    with pytest.raises(UsageError, match="FASTGDA_ENCODERS"):
        recorded_space(record, workspace)
    here = {"dino": str(tmp_path / "mounted" / "dino"), "clip": "a/hub-id"}
    assert recorded_space(record, workspace, {"dino": here["dino"]}).weights == here
    monkeypatch.setenv("FASTGDA_ENCODERS", str(tmp_path / "mounted"))
    assert recorded_space(record, workspace).weights == here
    with (tmp_path / "mounted" / "dino" / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match="are not those of"):
        recorded_space(record, workspace)
