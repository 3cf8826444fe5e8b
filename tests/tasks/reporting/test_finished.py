"""Kept summaries of finished pipelines: given back only where starting the pipeline again would change nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from storage_schemas.commit import manifest_path
from storage_schemas.publishing.publish import update_published
from storage_schemas.publishing.takedown import take_down
from storage_schemas.workspace import Workspace
from tasks.artifact import Made
from tasks.config.pipeline import PipelineConfig
from tasks.reporting.finished import RunSummary, inputs_stamp, keep_summary, kept_summary
from tasks.watching.trust import trust_in
from tests import tiny
from tests.tasks.whole_runs import WholeRun


def kept(run: WholeRun, folder: Path) -> tuple[PipelineConfig, RunSummary]:
    """A copy of a run with its inputs, whose summary is kept."""
    config, came_from = run.config, Path(run.config.workspace).parent
    shutil.copytree(came_from, folder, dirs_exist_ok=True)
    model = shutil.copytree(config.model.folder, folder / "model")
    config = config.model_copy(
        update={
            "workspace": str(folder / "workspace"),
            "data": config.data.model_copy(update={"shards": str(folder / "shape*.tar")}),
            "queries": config.queries.model_copy(update={"shards": str(folder / "queries.tar")}),
            "model": config.model.model_copy(update={"folder": model}),
        }
    )

    def moved(made: Made) -> Made:
        path = folder / Path(str(made.artifact.path)).relative_to(came_from)
        return replace(made, artifact=replace(made.artifact, path=path), reused=True)

    made = [moved(each) for each in (*run.curation.made, run.head, run.index, run.evaluation.metrics)]
    workspace = Workspace.at(config.workspace)
    summary = RunSummary(run.curation.run.name, made, trust_in(workspace, run.curation.run.name), "it is worse")
    keep_summary(config, inputs_stamp(config), summary)
    return config, summary


@pytest.mark.heavy
def test_a_finished_pipeline_is_known_by_its_inputs_and_by_what_it_made(similar: WholeRun, tmp_path: Path) -> None:
    config, summary = kept(similar, tmp_path)
    assert kept_summary(config, inputs_stamp(config)) == summary


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def artifact(summary: RunSummary, name: str) -> Path:
    (path,) = (Path(str(made.artifact.path)) for made in summary.made if made.artifact.name == name)
    return path


CHANGES: dict[str, Callable[[Path, RunSummary], object]] = {
    "a tar is written again": lambda folder, _: touch(folder / "shapes.tar"),
    "a tar comes in addition": lambda folder, _: tiny.write_tar(folder / "shapes-2.tar", tiny.sample_members([99])),
    "the queries are others": lambda folder, _: tiny.write_tar(folder / "queries.tar", tiny.sample_members(range(9))),
    "the model's weights are others": lambda folder, _: touch(next((folder / "model" / "unet").glob("*.safetensors"))),
    "a part of the scores is gone": lambda _, summary: next(
        artifact(summary, "teacher scores").glob("part-*")
    ).unlink(),
    "a part of the features is cut": lambda _, summary: next(
        artifact(summary, "features of samples").rglob("part-*.parquet")
    ).write_bytes(b""),
    "a manifest is gone": lambda _, summary: manifest_path(artifact(summary, "evaluation")).unlink(),
    "something is published since": lambda folder, _: update_published(
        Workspace(folder / "workspace"), lambda published: published and published.model_copy(update={"index": None})
    ),
    "an image is taken down since": lambda folder, _: take_down(
        Workspace(folder / "workspace"), [0], reason="asked", by="them"
    ),
    "the summary is damaged": lambda folder, _: next((folder / "workspace" / "finished").iterdir()).write_text("{"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_pipeline_is_started_again_where(
    similar: WholeRun, tmp_path: Path, change: Callable[[Path, RunSummary], object]
) -> None:
    config, summary = kept(similar, tmp_path)
    change(tmp_path, summary)
    assert kept_summary(config, inputs_stamp(config)) is None


def test_a_pipeline_is_started_again_with_another_setting(similar: WholeRun, tmp_path: Path) -> None:
    config, _ = kept(similar, tmp_path)
    head = config.head.model_copy(update={"seed": config.head.seed + 1})
    changed = config.model_copy(update={"head": head})
    assert kept_summary(changed, inputs_stamp(changed)) is None


def test_nothing_is_kept_of_what_may_be_incomplete_or_changed_meanwhile(similar: WholeRun, tmp_path: Path) -> None:
    config, summary = kept(similar, tmp_path)
    before = inputs_stamp(config)
    (tmp_path / "workspace" / "finished" / f"{config.name}.json").unlink()
    execution = config.execution.model_copy(update={"publish_incomplete": True})
    lenient = config.model_copy(update={"execution": execution})
    keep_summary(lenient, inputs_stamp(lenient), summary)
    touch(tmp_path / "shapes.tar")
    keep_summary(config, before, summary)
    assert not list((tmp_path / "workspace" / "finished").iterdir())


def test_weights_of_a_hub_are_never_known_to_be_the_same(similar: WholeRun) -> None:
    features = similar.config.features.model_copy(update={"space": "clip+pixel"})
    assert inputs_stamp(similar.config.model_copy(update={"features": features})) is None
