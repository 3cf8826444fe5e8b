"""Families of teachers: what their scores are made from, in which steps.

A family is a module of this folder, named as `Teacher.family` says, with an object `FAMILY`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.teachers.registry import TEACHERS
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.parts import Parts
from tasks.teaching.cost import KindCost, Size

Artifacts = Mapping[str, Artifact]  # by name: "samples", "queries", and what the family makes of them


class BlockScores(NamedTuple):
    """Scores of some training samples against some queries and their standard errors, (queries, n) float64, on the CPU.

    train_ids: (n,), those samples that have scores; left_out: the others, and why.
    errors: NaN where nothing is known of them.
    """

    train_ids: NDArray[np.int64]
    scores: Tensor
    errors: Tensor
    left_out: dict[int, str]


class Family(Protocol):
    """The steps by which the teachers of a family come to their scores."""

    def check(self, context: Context) -> None:
        """Raise `UsageError` where the configuration cannot be carried out, before any work."""

    def artifacts(self, context: Context, samples: Artifact, queries: Artifact) -> list[Artifact]:
        """Return what is made beside the scores, in order; keys follow from the inputs, also before it is made."""

    def parts(self, context: Context, artifacts: Artifacts) -> list[Parts]:
        """Return the parts of each of these artifacts, in the same order."""

    def key(self, context: Context, artifacts: Artifacts) -> str:
        """Return a hash of what scores depend on, beside candidates and settings."""

    def shard_shape(self, config: PipelineConfig, queries: int) -> tuple[int, int | None]:
        """Return queries and training samples of one score shard; None: all that the queries are scored against."""

    def scores(
        self, context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
    ) -> BlockScores:
        """Return the scores of a block of queries and training samples, ascending."""

    def costs(self, config: PipelineConfig, size: Size) -> list[KindCost]:
        """Return forward passes of each kind of part from the configuration and the size alone."""


def family_of(config: PipelineConfig) -> Family:
    """Return the family of the configured teacher."""
    module = importlib.import_module(f"tasks.teaching.{TEACHERS[config.teacher.name].family}")
    return cast(Family, module.FAMILY)
