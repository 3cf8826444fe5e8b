"""The configuration of the rank head is that of its training."""

from __future__ import annotations

import dataclasses

from fastgda_core.ranking.training import HeadTraining
from tasks.config.distilling import HeadConfig


def test_what_is_configured_of_a_head_is_what_its_training_takes_with_the_same_defaults() -> None:
    """Written down twice: a configuration is read without Lightning, whose import takes seconds."""
    taken = {field.name: field.default for field in dataclasses.fields(HeadTraining)}
    assert HeadConfig().training == taken
