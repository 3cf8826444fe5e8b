"""A judge whose models a command of the user's own trains: failing, mended and made again, priced, and told in SQL."""

from __future__ import annotations

import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastgda_core.evaluation.retraining import query_losses
from flows.curation import Curation, curate
from flows.evaluation import judge_run
from storage_schemas.files import any_path
from storage_schemas.runs.attempts import ShardState, read_attempts
from storage_schemas.sql.views import query
from tasks.config.execution import ExecutionConfig
from tasks.config.pipeline import PipelineConfig
from tasks.execution.estimate import estimate
from tasks.execution.outcomes import RunIncomplete
from tasks.execution.retry import release
from tasks.inputs.queries import load_queries
from tasks.teaching.retrainings import RemovalParts, RetrainingParts, judged_by
from tasks.teaching.trainer import TrainingFailed
from tests.tasks.teaching import a_trainer
from tests.tasks.whole_runs import configuration
from tests.tasks.without_prefect import without_prefect

SUBSETS = 3


def judge_of(script: Path, model_folder: Path, **changes: object) -> dict[str, object]:
    command = [sys.executable, str(script), str(model_folder), "{removed}", "{seed}", "{output}"]
    retrain = {"command": command, "folder": str(script.parent)}
    return {
        "retrain": retrain,
        "subsets": SUBSETS,
        "again": 0,
        "draws": 2,
        "leave_out": {"k": [3], "targets": 1},
    } | changes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> PipelineConfig:
    folder = tmp_path_factory.mktemp("by_command")
    judge = judge_of(folder / "trainer.py", model_folder)
    return configuration(folder, model_folder, teacher={"name": "similarity"}, judge=judge)


@pytest.fixture(scope="module")
def curation(config: PipelineConfig) -> Curation:
    with without_prefect():
        return curate(config)


def parts_of(curation: Curation, kind: str) -> RetrainingParts | RemovalParts:
    found = curation.run.parts[kind]
    assert isinstance(found, (RetrainingParts, RemovalParts))
    return found


def shown(config: PipelineConfig) -> str:
    priced = config.model_copy(update={"execution": ExecutionConfig(forwards_per_second=100.0)})
    console = Console(width=200)
    with console.capture() as captured:
        for line in estimate(priced).shown():
            console.print(line)
    return captured.get()


@pytest.mark.heavy
def test_models_of_a_command_that_failed_are_made_by_the_next_start(
    config: PipelineConfig, curation: Curation, model_folder: Path
) -> None:
    parts, script = parts_of(curation, RetrainingParts.kind), Path(config.workspace).parent / "trainer.py"
    script.write_text("print('the cluster is full')\nraise SystemExit(3)\n")
    before = shown(config)
    assert f"{parts.count + 5} models by judge.retrain.command, which are not among the device-hours" in before
    with without_prefect(), pytest.raises(RunIncomplete) as failed:
        judge_run(curation.run)
    assert f"{parts.count} of {parts.count} parts of 'retrainings' failed" in str(failed.value)
    line = next(line for line in str(failed.value).splitlines() if line.startswith("retrainings 00000: "))
    assert "TrainingFailed: judge.retrain.command ended with exit status 3; " in line
    assert line.endswith("the cluster is full")
    attempts = read_attempts(curation.run.workspace, curation.run.name, RetrainingParts.kind)
    assert {tries[-1].state for tries in attempts.values()} == {ShardState.failed}
    script.write_text(Path(a_trainer.__file__).read_text())
    release.fn(config.workspace, curation.run.name)
    with without_prefect():
        judge_run(curation.run)
    removals = parts_of(curation, RemovalParts.kind)
    assert not parts.missing() and not removals.missing()
    folder = parts.artifact.path
    assert isinstance(folder, Path)
    assert not list(folder.glob("*.begun")), "what trainings left is gone, but for their logs"
    assert len(list(folder.glob("*.log"))) == len({*parts.ids, *removals.ids})
    after = shown(config)
    assert "judge.retrain.command" not in after and "?" not in after


@pytest.mark.heavy
def test_what_a_process_left_that_died_after_its_commit_is_deleted(curation: Curation) -> None:
    parts = parts_of(curation, RetrainingParts.kind)
    folder = parts.artifact.path
    assert isinstance(folder, Path)
    (folder / f"{parts.ids[0]}.begun" / "output").mkdir(parents=True)
    (folder / f"{parts.ids[1]}.state").write_bytes(b"old")
    with without_prefect():
        judge_run(curation.run)
    assert not [path for path in folder.iterdir() if path.suffix in (".begun", ".state")]


@pytest.mark.heavy
def test_what_is_removed_decides_the_model_and_its_losses(curation: Curation, model_folder: Path) -> None:
    parts = parts_of(curation, RetrainingParts.kind)
    kept = parts.pool[1].kept(parts.config, parts.samples.rows)
    weights = load_file(model_folder / "unet" / a_trainer.NAME)
    removed = (~kept).nonzero().flatten().tolist()
    for step in range(a_trainer.STEPS):
        draw = np.random.default_rng([0, step, *removed])
        weights = {
            name: each + torch.from_numpy(0.01 * draw.standard_normal(tuple(each.shape), np.float32))
            for name, each in weights.items()
        }
    model = curation.run.context.model()
    denoiser = type(model.denoiser).from_config(model.denoiser.config)
    denoiser.load_state_dict(weights)
    losses = parts.losses(1)
    for column, asked in enumerate(load_queries(parts.queries)):
        found, _ = query_losses(
            model, denoiser.eval(), model.encode_images([asked.image])[0], model.encode_captions([asked.caption]),
            owner=asked.owner, seed=0, pairs=2, micro_batch=curation.run.context.micro_batch("judge"),
        )  # fmt: skip
        assert torch.allclose(found, losses[:, column], rtol=1e-5)
    rows = query(
        curation.run.workspace.root, "SELECT count(DISTINCT retraining) AS n FROM retrained_losses"
    ).to_pylist()
    assert rows == [{"n": len({*parts.ids, *parts_of(curation, RemovalParts.kind).ids})}]


@pytest.mark.heavy
def test_in_an_object_store_trainings_are_on_this_machines_disk_and_logs_in_the_store(
    curation: Curation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parts = parts_of(curation, RetrainingParts.kind)
    folder = any_path(f"memory://{uuid.uuid4().hex}/retrainings/key")
    config = parts.config.model_copy(update={"keep_weights": True})
    context = replace(parts.context, config=parts.context.config.model_copy(update={"judge": config}))
    there = RetrainingParts(context, parts.samples, parts.latents, parts.queries, replace(parts.artifact, path=folder))
    script = Path(curation.run.config.workspace).parent / "trainer.py"
    mended = script.read_text()
    script.write_text("print('the cluster is full')\nraise SystemExit(3)\n")
    with pytest.raises(TrainingFailed, match="the cluster is full"):
        there.make(1)
    assert "the cluster is full" in (folder / f"{there.ids[1]}.log").read_text()
    script.write_text(mended)
    there.make(1)
    assert torch.equal(there.losses(1), parts.losses(1))
    assert "without 12 samples, seed 0" in (folder / f"{there.ids[1]}.log").read_text()
    assert (folder / there.ids[1] / "unet" / "config.json").exists() and there.made(1) is not None
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {f"{there.ids[1]}.log"}


def test_the_text_of_the_command_is_part_of_the_models_key_and_where_it_runs_is_not(curation: Curation) -> None:
    parts = parts_of(curation, RetrainingParts.kind)

    def key(**changes: object) -> str:
        retrain = parts.config.retrain.model_copy(update=changes)
        judge = parts.config.model_copy(update={"retrain": retrain})
        context = replace(parts.context, config=parts.context.config.model_copy(update={"judge": judge}))
        return judged_by(context, judge, parts.latents, parts.queries, "run")[RetrainingParts.kind].key

    assert key() == key(folder=Path("/elsewhere")) == parts.artifact.key
    assert key(command=["another", "{removed}", "{seed}", "{output}"]) != parts.artifact.key
