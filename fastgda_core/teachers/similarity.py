"""The cheapest teacher: the cosine of a query and a training sample in a feature space.

It does not use the model. Every other teacher has to beat it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.teachers.needs import Needs, Work

if TYPE_CHECKING:  # a configuration looks teachers up, and is checked before torch is loaded
    from torch import Tensor


@dataclass(frozen=True)
class SimilarityTeacher:
    """Scores by cosine; see `fastgda_core.teachers.registry.Teacher`."""

    family: ClassVar[str] = "similarity"
    settings: ClassVar[frozenset[str]] = frozenset()
    redrawn: ClassVar[bool] = False

    def check_precision(self, precision: Precision) -> None:
        """Raise `UsageError` for anything but float32, in which features are stored."""
        if precision is not Precision.float32:
            raise UsageError(f"teacher.precision is {precision}, but features are float32: remove it")

    def needs(self, work: Work) -> Needs:
        """Return no pass of the denoiser; features are kept anyway, for the rank head."""
        return Needs("", 0.0, 0.0, 0.0, 0.0)

    def scores(self, queries: Tensor, samples: Tensor) -> Tensor:
        """Return cosines, (queries, n) float64, of features (queries, d) and (n, d); 0 where a vector has no length."""
        first, second = (vectors.double() for vectors in (queries, samples))
        lengths = first.norm(dim=1)[:, None] * second.norm(dim=1)
        return (first @ second.T / lengths).masked_fill(lengths == 0, 0.0)
