"""`teacher.negatives` from the configuration to the labels and scores that a head learns from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from storage_schemas.runs.ledger import read_labelling
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.distilling.publish import rank_scores
from tasks.distilling.ranks import rank_pairs
from tasks.teaching.run import Run
from tests.storage_schemas.workspaces import QUERIES, finish_run
from tests.tasks.configs import document


def rank_labels(root: Path, negatives: str) -> Made:
    config = PipelineConfig.model_validate(document(workspace=str(root), teacher__negatives=negatives))
    scores = Artifact("scores", "run-1", Workspace(root).scores("run-1"), 12)
    return rank_scores.fn(Run(Context(config, "model"), {"scores": scores}))


def test_the_configuration_labels_the_run_without_scoring_it_again(tmp_path: Path) -> None:
    finish_run(tmp_path, shift=-1.0)
    kept, tied = rank_labels(tmp_path, "keep"), rank_labels(tmp_path, "tie")
    assert read_labelling(Workspace(tmp_path), "run-1").negatives == "tie"
    assert kept.artifact.key != tied.artifact.key and kept.artifact.rows == tied.artifact.rows == 12
    again = rank_labels(tmp_path, "keep")
    assert again.artifact.key == kept.artifact.key and again.reused
    assert read_labelling(Workspace(tmp_path), "run-1").negatives == "keep"


@pytest.mark.parametrize(
    ("negatives", "labels", "scores"),
    [("keep", [0.75, 0.5, 0.25, 1.0], [-1.0, 0.0, 1.0, -1.0]), ("tie", [1.0, 1.0, 0.25, 1.0], [0.0, 0.0, 1.0, 0.0])],
)
def test_a_head_learns_nothing_from_negative_scores_where_they_are_tied(
    tmp_path: Path, negatives: str, labels: list[float], scores: list[float]
) -> None:
    finish_run(tmp_path, shift=-1.0)
    ranks = rank_labels(tmp_path, negatives).artifact
    rows = torch.arange(len(QUERIES))
    pairs, standardised = (
        rank_pairs(Workspace(tmp_path), ranks, QUERIES, rows, 4, standardised=each) for each in (False, True)
    )
    assert pairs.label.view(3, 4).tolist() == [labels] * 3
    expected = (np.array(scores) - np.mean(scores)) / np.std(scores)
    np.testing.assert_allclose(standardised.label.view(3, 4), np.tile(expected, (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(standardised.outside, [expected.min()] * 3, rtol=1e-6)
