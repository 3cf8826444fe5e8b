"""Scores at the checkpoints of a training: one pass over the samples at each, standardised and added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.precision import Precision
from fastgda_core.teachers.registry import UnlearningTeacher
from fastgda_core.teachers.scores import Look, Scores, Update, standardised_sum
from fastgda_core.teachers.scores import base_losses as losses_of_block
from fastgda_core.teachers.training_loss import SampleBlock
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.teaching.families import Artifacts
from tasks.teaching.updates import QueryUpdates, expected_spreads


@dataclass(frozen=True)
class AtCheckpoint:
    """The artifacts that scores at one checkpoint are made of; `context` is the run's at that checkpoint."""

    context: Context
    curvature: Artifact
    updates: Artifact
    base_losses: Artifact | None

    def asked(self, numbers: list[int], at_a_time: int) -> Asked:
        """Return the steps of some queries, so many at a time."""
        several = len(self.context.at_checkpoints()) > 1
        spreads = expected_spreads(self.updates, numbers) if several else None
        return Asked(self.context, QueryUpdates(self.context, self.updates, numbers, at_a_time), spreads)


@dataclass(frozen=True, eq=False)
class Asked:
    """Unlearning steps of some queries at one checkpoint.

    updates: Delta theta of some queries at a time.
    spreads: what their scores are divided by, (queries,); None at the only checkpoint, where they keep their units.
    """

    context: Context
    updates: Iterable[Update]
    spreads: Tensor | None


def at_checkpoints(context: Context, artifacts: Artifacts) -> list[AtCheckpoint]:
    """Return a run's artifacts at each checkpoint; one where there are not several."""
    return [
        AtCheckpoint(
            here,
            artifacts[here.named("curvature")],
            artifacts[here.named("unlearning steps")],
            artifacts.get(here.named("base losses")),
        )
        for here in context.at_checkpoints()
    ]


def summed_scores(
    teacher: UnlearningTeacher,
    several: Sequence[Asked],
    plan: NoisePlan,
    block: SampleBlock,
    *,
    precision: Precision | None = None,
    base_losses: Sequence[Tensor] | None = None,
    look: Look | None = None,
) -> Scores:
    """Return the scores of a block of samples against some queries; of several checkpoints the standardised sum.

    Args:
        teacher: how samples are scored.
        several: the queries' steps at each checkpoint.
        plan: the noise plan.
        block: the training samples.
        precision: of the forwards; default: the configured one.
        base_losses: of the block at each checkpoint, for an exact teacher; default: they are computed.
        look: sees the gradients of first-order scores.
    """
    found, spreads = [], []
    for number, asked in enumerate(several):
        context, base = asked.context, None
        model, size = context.teacher_model(precision), context.micro_batch("losses")
        if teacher.first_order:
            size = context.micro_batch("gradients")
        else:
            base = losses_of_block(model, plan, block, size) if base_losses is None else base_losses[number]
        found.append(teacher.scores(model, context.layers(model), plan, block, asked.updates, base, size, look))
        if asked.spreads is not None:
            spreads.append(asked.spreads)
    return standardised_sum(found, spreads) if spreads else found[0]
