"""The teachers behind one protocol: how a (query, training sample) pair gets its score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError

if TYPE_CHECKING:  # a configuration looks teachers up, and is checked before torch is loaded
    from torch import Tensor

    from fastgda_core.curvature.fisher import FisherKind
    from fastgda_core.curvature.layers import Layer
    from fastgda_core.diffusion.model import DiffusionModel
    from fastgda_core.diffusion.noise import NoisePlan
    from fastgda_core.teachers.micro_batch import MicroBatch
    from fastgda_core.teachers.scores import Update
    from fastgda_core.teachers.training_loss import SampleBlock


class Teacher(Protocol):
    """Scores training samples against queries.

    fisher: which curvature preconditions the query's gradient.
    first_order: one pass over a sample serves every query, and no base losses are needed.
    """

    @property
    def fisher(self) -> FisherKind: ...
    @property
    def first_order(self) -> bool: ...

    def check_precision(self, precision: Precision) -> None:
        """Raise `UsageError` where scores in this precision would not be this teacher's."""

    def scores(
        self,
        model: DiffusionModel,
        layers: Mapping[str, Layer],
        plan: NoisePlan,
        block: SampleBlock,
        updates: Iterable[Update],
        base_losses: Tensor | None,
        micro_batch: MicroBatch,
    ) -> Tensor:
        """(queries, n) float64; `updates` hold some queries at a time, `base_losses` are (n, f) where needed."""


@dataclass(frozen=True)
class ExactTeacher:
    """The rise of a sample's loss after the unlearning step: one pass over the samples for each query."""

    fisher: FisherKind
    first_order: bool = False

    def check_precision(self, precision: Precision) -> None:
        if not precision.exact:
            raise UsageError(
                f"teacher.precision is {precision}, but an exact score is the difference of two losses that agree in "
                "their first digits, and those are all that it keeps: use float32, or teacher abu_plus_first_order"
            )

    def scores(
        self,
        model: DiffusionModel,
        layers: Mapping[str, Layer],
        plan: NoisePlan,
        block: SampleBlock,
        updates: Iterable[Update],
        base_losses: Tensor | None,
        micro_batch: MicroBatch,
    ) -> Tensor:
        import torch

        from fastgda_core.teachers.scores import exact_scores

        self.check_precision(model.precision)
        assert base_losses is not None
        return torch.stack(
            [
                exact_scores(model, layers, plan, block, base_losses, query, micro_batch)
                for update in updates
                for query in _one_by_one(update)
            ]
        )


@dataclass(frozen=True)
class FirstOrderTeacher:
    """The same to first order in the step: one pass over the samples for all queries."""

    fisher: FisherKind
    first_order: bool = True

    def check_precision(self, precision: Precision) -> None:
        """Any will do that agrees with float64 on the model at hand; whoever runs it has to look."""

    def scores(
        self,
        model: DiffusionModel,
        layers: Mapping[str, Layer],
        plan: NoisePlan,
        block: SampleBlock,
        updates: Iterable[Update],
        base_losses: Tensor | None,
        micro_batch: MicroBatch,
    ) -> Tensor:
        from fastgda_core.teachers.scores import first_order_scores

        return first_order_scores(model, layers, plan, block, updates, micro_batch)


TEACHERS: dict[str, Teacher] = {
    "abu": ExactTeacher("diagonal"),
    "abu_plus": ExactTeacher("ekfac"),
    "abu_plus_first_order": FirstOrderTeacher("ekfac"),
}


def _one_by_one(update: Update) -> Iterable[dict[str, Tensor]]:
    for number in range(len(next(iter(update.values())))):
        yield {name: change[number] for name, change in update.items()}
