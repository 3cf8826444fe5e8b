"""A configuration that another release stored is no reason to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from storage_schemas.runs.ledger import write_ledger
from storage_schemas.runs.liveness import Assignment, PartsRecord, write_assignment
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.config.stored import config_of, lifted
from tasks.context import Context
from tasks.execution.cost import known_rate
from tasks.serving.attributor import Attributor
from tasks.teaching.run import load_run
from tasks.watching.run_status import run_status
from tests.storage_schemas.workspaces import QUERIES, commit_shard, plan_run, publish_run, show
from tests.tasks.configs import document

EXECUTION = {"workers": 3, "price_per_device_hour": 2.0, "retired": 1}


def store(root: Path, **changes: object) -> Workspace:
    """A workspace with a run whose configuration has settings that this release does not know, and lacks some."""
    shares = {"validation_share": 0.1, "test_share": 0.1, "shuffled": True}
    asked = {"model__retired": 1, "queries__split": shares, "gone": {"a": 1}, "features": {"space": "pixel"}, **changes}
    config = document(workspace=str(root), **asked)
    record = plan_run(root, "run-1", config=config)
    stages = {
        "samples": PartsRecord(key="s", path=str(record.samples), rows=4),
        "queries": PartsRecord(key="q", path=str(record.queries), rows=len(QUERIES)),
    }
    found = Assignment(run="run-1", config=config, model_hash="m", stages=stages, execution=EXECUTION, generation=0)
    write_assignment(Workspace.at(root), found)
    return Workspace.at(root)


def test_a_retry_lifts_the_configuration_of_another_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path)
    found = config_of(str(tmp_path), "run-1")
    assert (found.execution.workers, found.features.centre, found.curvature.importance) == (3, False, False)
    assert (found.queries.twins, found.workspace) == (0, str(tmp_path))
    said = capsys.readouterr().err
    assert said.count("planned by another release") == 1
    for name in ("model.retired", "queries.split.shuffled", "gone", "execution.retired"):
        assert name in said


def test_a_setting_that_means_something_else_now_is_refused(tmp_path: Path) -> None:
    store(tmp_path, teacher__layers="norms")
    with pytest.raises(UsageError, match=r"run run-1, which another release stored: teacher\.layers: .*cross-attn-kv"):
        config_of(str(tmp_path), "run-1")


@pytest.mark.parametrize(("layers", "known"), [("attn", True), ("norms", False)])
def test_a_run_of_another_release_stops_no_other_run(tmp_path: Path, layers: str, known: bool) -> None:
    workspace = store(tmp_path, teacher__layers=layers)
    for shard, query in enumerate(QUERIES):
        commit_shard(tmp_path, "run-1", shard, query)
    write_ledger(workspace, "run-1")
    context = Context(PipelineConfig.model_validate(document(workspace=str(tmp_path))), "m")
    assert (known_rate(context) is not None) == known


def test_serving_asks_the_configuration_for_the_device_alone(tmp_path: Path) -> None:
    publish_run(tmp_path)
    stored: dict[str, Any] = {"head": "heads/h", "index": "indexes/i", "config": {"device": "cpu", "gone": 1}}
    show(Workspace.at(tmp_path), **stored)
    with pytest.raises(StoreError, match=r"head\.json is gone"):  # which comes next
        Attributor(Workspace.at(tmp_path))


def test_workers_and_status_read_it_too(tmp_path: Path) -> None:
    store(tmp_path)
    status = run_status(Workspace.at(tmp_path), "run-1")
    assert status.cost == 0.0, "the price is known"
    assert load_run(str(tmp_path), "run-1", "key").context.config.name == "tiny"


def test_what_is_stored_today_is_lifted_as_it_is() -> None:
    config = PipelineConfig.model_validate(document())
    assert lifted(PipelineConfig, config.model_dump(mode="json"), "it") == (config, [])
