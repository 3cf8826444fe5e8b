"""The configuration of the rank head is that of its training."""

from __future__ import annotations

import dataclasses

import pytest

from fastgda_core.ranking import training
from fastgda_core.ranking.training import HeadTraining, RankData, TrainedHead
from tasks.config.distilling import HeadConfig
from tasks.distilling import heads
from tests.tasks.whole_runs import WholeRun


def test_what_is_configured_of_a_head_is_what_its_training_takes_with_the_same_defaults() -> None:
    """Written down twice: a configuration is read without Lightning, whose import takes seconds."""
    taken = {field.name: field.default for field in dataclasses.fields(HeadTraining)}
    del taken["accelerator"]  # of the pipeline's device
    assert HeadConfig().training == taken


def test_a_head_is_trained_on_the_pipelines_device(similar: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning, left to itself, takes a GPU wherever there is one."""
    given: list[str] = []
    train = training.train_head

    def look(data: RankData, options: HeadTraining, *rest: object) -> TrainedHead:
        given.append(options.accelerator)
        return train(data, dataclasses.replace(options, epochs=1))

    monkeypatch.setattr(training, "train_head", look)
    artifacts = similar.run.artifacts
    heads._train(similar.context, artifacts["samples"], [artifacts["queries"]], similar.curation.ranks, None)
    assert given == ["cpu"]
