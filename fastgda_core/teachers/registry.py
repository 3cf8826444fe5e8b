"""The teachers by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.teachers.kernel import KERNEL_TEACHERS
from fastgda_core.teachers.needs import EXPECTED_ASCENT, GRADIENT_FORWARDS, MLP_GRADIENT_FORWARDS, Needs, Work
from fastgda_core.teachers.similarity import SimilarityTeacher

if TYPE_CHECKING:  # a configuration looks teachers up, and is checked before torch is loaded
    from torch import Tensor

    from fastgda_core.curvature.fisher import FisherKind
    from fastgda_core.curvature.layers import Layer
    from fastgda_core.diffusion.model import DiffusionModel
    from fastgda_core.diffusion.noise import NoisePlan
    from fastgda_core.teachers.micro_batch import MicroBatch
    from fastgda_core.teachers.scores import Look, Scores, Update
    from fastgda_core.teachers.training_loss import SampleBlock


class Teacher(Protocol):
    """A method that scores (query, training sample) pairs.

    family: a name for the steps and data that scores are made from; the teachers of one family share both.
    settings: the fields of a configuration's section `teacher` that this teacher reads and some others do not.
    redrawn: drawn again with another seed it gives other scores, so that it can be compared with itself.
    """

    @property
    def family(self) -> str: ...
    @property
    def settings(self) -> frozenset[str]: ...
    @property
    def redrawn(self) -> bool: ...

    def check_precision(self, precision: Precision) -> None:
        """Raise `UsageError` where scores in this precision would not be this teacher's."""

    def needs(self, work: Work) -> Needs:
        """Return what this teacher needs for so much work."""


@dataclass(frozen=True)
class UnlearningTeacher:
    """Scores a training sample by the rise of its loss after an unlearning step of the query.

    fisher: which curvature preconditions the query's gradient.
    first_order: the rise is taken to first order in the step: one pass over the samples serves every query, and no base
        losses are needed. Else it is exact: one pass over the samples for each query.
    """

    fisher: FisherKind
    first_order: bool
    family: ClassVar[str] = "unlearning"
    settings: ClassVar[frozenset[str]] = frozenset(
        {
            *("objective", "layers", "damping", "precision", "alpha", "training_size", "timesteps", "first_timestep"),
            *("timestep_list", "timestep_weights", "draws", "antithetic", "seed", "gradient_pairs", "update_rank"),
            *("loaded_queries", "agreement", "checkpoints"),
        }
    )
    redrawn: ClassVar[bool] = True

    def check_precision(self, precision: Precision) -> None:
        """Raise `UsageError` where an exact score would be lost in rounding.

        A first-order score may be computed in any precision that agrees with float64 on the model at hand. The user has
        to check that.
        """
        if not self.first_order and not precision.exact:
            raise UsageError(
                f"teacher.precision is {precision}, but an exact score is the difference of two losses that agree in "
                "their first digits, and those are all that it keeps: use float32, or teacher abu_plus_first_order"
            )

    def needs(self, work: Work) -> Needs:
        """Return a Fisher, base losses where scores are exact, and the samples run again for a new query.

        In memory are one query's step or gradient, and as many float32 numbers of the Fisher: EK-FAC's eigenvalues, as
        its bases are smaller.
        """
        forwards = work.pairs * GRADIENT_FORWARDS
        memory = 8.0 * work.weights
        if self.first_order:
            again = work.samples * work.noises * GRADIENT_FORWARDS
            return Needs(f"{self.fisher} Fisher", 0.0, 0.0, forwards + again, memory)
        again = work.samples * work.noises
        return Needs(f"{self.fisher} Fisher, base losses", 8.0, work.noises, forwards + again, memory)

    def scores(
        self,
        model: DiffusionModel,
        layers: Mapping[str, Layer],
        plan: NoisePlan,
        block: SampleBlock,
        updates: Iterable[Update],
        base_losses: Tensor | None,
        micro_batch: MicroBatch,
        look: Look | None = None,
    ) -> Scores:
        """Return scores of all queries, (queries, n), first-order ones with what tells their standard errors.

        `updates` hold some queries at a time. Exact scores need the base losses, as `fastgda_core.teachers.scores`
        makes them; of the others `look` sees the gradients that they are made of.
        """
        import torch

        from fastgda_core.teachers.scores import Scores, exact_scores, first_order_scores_and_errors

        self.check_precision(model.precision)
        if self.first_order:
            return first_order_scores_and_errors(model, layers, plan, block, updates, micro_batch, look)
        assert base_losses is not None
        values = torch.stack(
            [
                exact_scores(model, layers, plan, block, base_losses, query, micro_batch)
                for update in updates
                for query in _one_by_one(update)
            ]
        )
        return Scores.whole(values)  # base losses are kept as means over the draws


@dataclass(frozen=True)
class NdaTeacher:
    """Scores by shares of the training patches that a perfect denoiser averages; see `fastgda_core.teachers.nda`."""

    family: ClassVar[str] = "nda"
    settings: ClassVar[frozenset[str]] = frozenset(
        {"timestep_list", "draws", "seed", "patch_sizes", "patch_matches", "patch_pixels"}
    )
    redrawn: ClassVar[bool] = False  # as the check of self-consistency knows the unlearning family alone

    def check_precision(self, precision: Precision) -> None:
        """Raise `UsageError` for anything but float32, in which distances of patches are computed."""
        if precision is not Precision.float32:
            raise UsageError(f"teacher.precision is {precision}, but patches are compared in float32: remove it")

    def needs(self, work: Work) -> Needs:
        """Return no pass of the denoiser; all samples are read for a new query, some patches of them at a time."""
        return Needs("", 0.0, 0.0, 0.0, 2.0**27)


@dataclass(frozen=True)
class MucsTeacher:
    """Scores a training sample by the rise of its loss after a query was unlearned by bounded ascent; see `mucs`."""

    family: ClassVar[str] = "mucs"
    settings: ClassVar[frozenset[str]] = frozenset(
        {
            *("objective", "layers", "precision", "learning_rate", "forget_weight", "most_steps", "gradient_pairs"),
            *("timestep_list", "timestep_weights", "draws", "antithetic", "seed", "update_rank", "checkpoints"),
        }
    )
    redrawn: ClassVar[bool] = False

    def check_precision(self, precision: Precision) -> None:
        """Raise `UsageError` where a score would be lost in rounding."""
        if not precision.exact:
            raise UsageError(
                f"teacher.precision is {precision}, but a score of mucs is made of two losses of nearly one size: use "
                "float32"
            )

    def needs(self, work: Work) -> Needs:
        """Return base losses, and for a new query the steps' own forwards and the losses of all samples after them.

        A step takes a batch of the query's pairs and one of samples. Ascents end long before the last step that they
        may take.
        """
        steps = min(work.ascent_steps, EXPECTED_ASCENT) * 2 * work.pairs * MLP_GRADIENT_FORWARDS
        noises = 8.0 * work.noises
        return Needs("base losses", noises, work.noises, steps + work.samples * work.noises, 12.0 * work.weights)


UNLEARNING_TEACHERS: dict[str, UnlearningTeacher] = {
    "abu": UnlearningTeacher("diagonal", first_order=False),
    "abu_plus": UnlearningTeacher("ekfac", first_order=False),
    "abu_plus_first_order": UnlearningTeacher("ekfac", first_order=True),
}
TEACHERS: dict[str, Teacher] = {
    **UNLEARNING_TEACHERS,
    "similarity": SimilarityTeacher(),
    **KERNEL_TEACHERS,
    "nda": NdaTeacher(),
    "mucs": MucsTeacher(),
}
# What a teacher's settings are where nobody sets them, and its source has them other than the field.
DEFAULTS: dict[str, dict[str, object]] = {
    # sony/mucs: ratios, weights of the MLPs, batches of 100, and 100 places in the noisier 70 % of the schedule.
    "mucs": {
        "objective": Objective.ratio,
        "layers": "mlp",
        "gradient_pairs": 100,
        "timestep_list": tuple(range(306, 1000, 7)),
    }
}


def _one_by_one(update: Update) -> Iterable[dict[str, Tensor]]:
    for number in range(len(next(iter(update.values())))):
        yield {name: change[number] for name, change in update.items()}
