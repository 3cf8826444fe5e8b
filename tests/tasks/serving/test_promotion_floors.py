"""An index that is not good enough is not served."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from storage_schemas import tables
from storage_schemas.commit import commit_table
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.snapshots.published import read_published
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.judging.metric_rows import metric_row
from tasks.serving.promotion import promote
from tests.storage_schemas.workspaces import commit_index, finish_run
from tests.tasks.configs import document


def measured(workspace: Workspace, name: str, tuned: float, untuned: float) -> Made:
    """Metrics of an index, as an evaluation leaves them."""
    rows = [
        metric_row("mAP", space, torch.tensor([value]), cutoff=1)
        for space, value in (("tuned", tuned), ("untuned", untuned))
    ]
    path = workspace.metrics(name)
    commit_table(path, pa.Table.from_pylist(rows, schema=tables.METRICS.schema), tables.METRICS, key=name, started=0.0)
    return Made(Artifact("evaluation", name, path, len(rows)), 0.0, False)


@pytest.mark.parametrize(
    ("changes", "served"),
    [({}, "good"), ({"evaluation__gain_floor": None}, "random"), ({"evaluation__gain_floor": 0.5}, "random")],
)
def test_a_head_below_the_untuned_features_is_not_served_unless_that_is_asked_for(
    tmp_path: Path, changes: dict[str, object], served: str
) -> None:
    finish_run(tmp_path)
    samples = publish_runs(Workspace(tmp_path), ["run-1"]).samples
    floors = PipelineConfig.model_validate(document(**changes)).evaluation
    workspace = Workspace(tmp_path)
    outcomes = {}
    for name, tuned in (("good", 0.210), ("random", 0.081)):
        commit_index(workspace, name, samples or "", head=name)
        index = Artifact("index", name, workspace.index(name), 1)
        outcomes[name] = promote.fn(workspace, floors, index, measured(workspace, name, tuned, 0.144))
    published = read_published(workspace)
    assert published.index == workspace.relative(workspace.index(served))
    assert published.head == workspace.relative(workspace.head(served))
    assert bool(outcomes["random"].refused) == (served == "good")
    if served == "good":
        assert "0.56 x the untuned features', below evaluation.gain_floor 1.0" in outcomes["random"].refused
