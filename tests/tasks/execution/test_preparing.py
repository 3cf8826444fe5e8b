"""What is done before a run is planned: it has workers, attempts, a status and a retry as a run has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgda_core.errors import UsageError
from storage_schemas.commit import read_manifest
from storage_schemas.runs.ledger import check_known, run_names
from storage_schemas.runs.liveness import is_preparation, preparation_names, read_beats
from storage_schemas.runs.records import UnknownRun
from tasks.config.pipeline import PipelineConfig
from tasks.config.stored import config_of
from tasks.context import Context
from tasks.execution.coordinator import begin_run
from tasks.execution.number_ranges import chosen_shards
from tasks.execution.outcomes import RunIncomplete
from tasks.execution.preparing import make_all, make_features, make_samples, stored_preparation
from tasks.execution.retry import release
from tasks.inputs import features, sample_parts
from tasks.inputs.features import FeatureParts
from tasks.inputs.samples import ingest_samples, missing_samples
from tasks.teaching.preparation import Preparation
from tasks.teaching.run import read_work
from tasks.watching.run_status import latest_run, run_status
from tasks.watching.status_text import facts, status_markdown
from tests import tiny
from tests.tasks.configs import document
from tests.tasks.without_prefect import without_prefect

SAMPLES = 20


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """Five tars, each a part, and four parts of features."""
    monkeypatch.setattr(features, "PART_ITEMS", 5)
    monkeypatch.setattr(sample_parts, "_ends_a_part", lambda _shard, _size: True)
    for number in range(5):
        tiny.write_tar(tmp_path / f"{number}.tar", tiny.sample_members(range(4 * number, 4 * number + 4)))
    changes = {"data__shards": str(tmp_path / "*.tar"), "features": {"space": "pixel"}}
    execution = {"retries": 0, "retry_delay": 0}
    config = document(workspace=str(tmp_path / "workspace"), execution=execution, **changes)
    return Context(PipelineConfig.model_validate(config), "model")


def test_a_flow_has_tars_read_and_samples_encoded_as_parts_of_a_run(context: Context) -> None:
    with without_prefect():
        samples = make_samples(context)
        made = make_features(context, samples.artifact)
    assert samples.artifact.rows == made.artifact.rows == SAMPLES and not samples.reused
    workspace = context.workspace
    of_samples, of_features = preparation_names(workspace)
    assert of_samples.startswith("tiny-samples-") and of_features.startswith("tiny-features-")
    for name, parts in ((of_samples, 5), (of_features, 4)):
        status = run_status(workspace, name)
        (stage,) = status.stages
        assert (status.state, status.name, stage.parts, stage.done) == ("done", "tiny", parts, parts)
        assert status.device_hours > 0 and not status.failures
        assert all(beat.ended for beat in read_beats(workspace, name))  # this process goes on with other work
        assert [name for name, _ in facts(status)] == ["state", "device-hours"]
    assert not run_names(workspace) and latest_run(workspace) == of_features
    with without_prefect():
        assert make_samples(context).reused and make_features(context, samples.artifact).artifact == made.artifact


def test_a_part_that_fails_is_named_and_made_by_a_retry(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    make = FeatureParts.make

    def fails(self: FeatureParts, number: int) -> object:
        if number == 2:
            raise KeyError("a bug")
        return make(self, number)

    samples = ingest_samples.fn(context).artifact
    monkeypatch.setattr(FeatureParts, "make", fails)
    with without_prefect(), pytest.raises(RunIncomplete, match="1 of 4 parts of 'features' failed") as refusal:
        make_features(context, samples)
    workspace, name = context.workspace, refusal.value.run
    status = run_status(workspace, name)
    assert status.state == "incomplete" and [failure.name for failure in status.failures] == ["features 00002"]
    assert f"fastgda retry {name}" in status_markdown(status) and "3 of 4 parts, 1 failed" in status_markdown(status)
    monkeypatch.undo()
    monkeypatch.setattr(features, "PART_ITEMS", 5)
    config = config_of(str(workspace.root), name)
    assert config.execution == context.config.execution
    release.fn(str(workspace.root), name)
    again = stored_preparation(config, name)
    before = {number: read_manifest(again.parts["features"].path(number)) for number in (0, 1, 3)}
    with without_prefect():
        make_all(again)
    assert run_status(workspace, name).state == "done"
    assert before == {number: read_manifest(again.parts["features"].path(number)) for number in (0, 1, 3)}


def test_a_worker_reads_a_preparation_from_its_assignment(context: Context) -> None:
    parts = missing_samples(context)
    assert parts is not None
    workspace, location = context.workspace, str(context.workspace.root)
    preparation = Preparation.of_samples(context, parts)
    begin_run.fn(preparation)
    assert is_preparation(workspace, preparation.name) and run_status(workspace, preparation.name).state == "planned"
    read = read_work(location, preparation.name)
    theirs = read.parts["samples"]
    assert isinstance(read, Preparation) and [theirs.path(number) for number in range(theirs.count)] == [
        parts.path(number) for number in range(5)
    ]
    theirs.make(3)
    assert parts.missing() == [0, 1, 2, 4]
    check_known(workspace, preparation.name)
    with pytest.raises(UnknownRun):
        check_known(workspace, "another")
    with pytest.raises(UsageError, match="has no score shards"):
        chosen_shards(workspace, preparation.name, "0")
    workspace.sample_plan(parts.artifact.key).unlink()
    with pytest.raises(UsageError, match="start the command that reads the tars again"):
        _ = read_work(location, preparation.name).parts


def test_samples_that_were_left_out_are_encoded_again_once_after_a_release(context: Context, tmp_path: Path) -> None:
    samples = ingest_samples.fn(context).artifact
    tar = tmp_path / "2.tar"
    whole, image = tar.read_bytes(), tiny.draw(9)[0]
    tar.write_bytes(whole.replace(image, image[:40] + bytes(len(image) - 40)))
    space = features.in_space(context, space="pixel+efficientnet_lite0")
    preparation = Preparation.of_features(space, FeatureParts.of(space, samples, [space]))
    begun = begin_run.fn(preparation)
    preparation.parts["features"].make_missing()
    tar.write_bytes(whole)
    assert release.fn(str(context.workspace.root), preparation.name) == 2  # files, of two encoders
    assert begun.run.parts["features"].missing() == [1]
    assert json.loads((context.workspace.runs / preparation.name / "assignment.json").read_text())["generation"] == 1
