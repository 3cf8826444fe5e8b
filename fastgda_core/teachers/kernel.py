"""Teachers that compare gradient features: TRAK, D-TRAK, JourneyTRAK, TracIn and DMin.

A feature is the projected gradient of a sample's objective under the noise plan. Scores are inner products of the
samples' features with the queries', with a kernel between them or without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.teachers.needs import GRADIENT_FORWARDS, Needs, Work

if TYPE_CHECKING:  # a configuration looks teachers up, and is checked before torch is loaded
    from torch import Tensor

    from fastgda_core.curvature.layers import Layer
    from fastgda_core.diffusion.loss import Condition
    from fastgda_core.diffusion.model import DiffusionModel
    from fastgda_core.diffusion.noise import NoisePlan
    from fastgda_core.sketches.projection import Projection
    from fastgda_core.teachers.micro_batch import MicroBatch
    from fastgda_core.teachers.sample_gradients import SampleGradients
    from fastgda_core.teachers.training_loss import SampleBlock

STORED_BYTES = 2  # of a number of a feature
_ROWS_OF_TILES = 3072  # of a kernel's matrix are in memory at a time: those of a tile, and half of them as a product
_HELD = 16  # samples whose gradients are in memory at a time, or fewer; no product waits for more of them
_NO_LENGTH = 1e-30  # below, a gradient is 0 and stays so


@dataclass(frozen=True)
class KernelTeacher:
    """Scores by inner products of gradient features; see `fastgda_core.teachers.registry.Teacher`.

    objective: whose gradients the features are.
    dimensions: of the projection, where none are configured.
    ridge: lambda of (Phi^T Phi + lambda I)^-1 where none is configured, as in the authors' code; None: no kernel.
    journey: a query's gradient is of losses at the clean images that the sampler saw on its way to the query.
    each_timestep: gradients are normalised at each timestep, and compared timestep by timestep.
    """

    objective: Objective
    dimensions: int
    ridge: float | None = None
    journey: bool = False
    each_timestep: bool = False
    family: ClassVar[str] = "kernel"
    redrawn: ClassVar[bool] = False

    @property
    def settings(self) -> frozenset[str]:
        plan = ("timesteps", "first_timestep", "timestep_list", "timestep_weights", "draws", "antithetic", "seed")
        read = {"layers", "precision", "projection", "loaded_queries", "checkpoints", *plan}
        read |= set() if self.each_timestep else {"gradient_pairs"}
        return frozenset(read if self.ridge is None else read | {"ridge"})

    @property
    def summed_over_checkpoints(self) -> bool:
        """Whether scores at several checkpoints are added, as TracIn's are."""
        return self.ridge is None and not self.each_timestep

    def check_precision(self, precision: Precision) -> None:
        """Raise `UsageError` for a precision whose rounding nobody has measured for these features."""
        if not precision.exact:
            raise UsageError(f"teacher.precision is {precision}, but features are made in float32: remove it")

    def lambda_of(self, ridge: float | None, dimensions: int) -> float:
        """Return lambda for features that keep lengths.

        `teacher.ridge` counts as lambda does in TRAK's and D-TRAK's code, whose projections multiply every inner
        product by the number of dimensions.
        """
        assert self.ridge is not None
        return (self.ridge if ridge is None else ridge) / dimensions

    def needs(self, work: Work) -> Needs:
        """Return the features of all samples, made once: a query takes its own gradient and one product with them."""
        size = min(work.dimensions or self.dimensions, work.weights)
        vectors = work.images * (work.timesteps if self.each_timestep else 1)
        pairs = work.noises if self.each_timestep else work.pairs
        fits, memory = "gradient features", 4.0 * work.weights
        if self.ridge is not None:
            fits = "gradient features, kernel"
            memory += 8.0 * min(work.samples * work.samples, _ROWS_OF_TILES * size)
        stored, of_sample = float(STORED_BYTES * size * vectors), work.noises * GRADIENT_FORWARDS
        sampling = 2 * work.sampler_steps if self.journey else 0  # with and without the caption
        return Needs(fits, stored, of_sample, pairs * GRADIENT_FORWARDS + sampling, memory)

    def of_samples(
        self,
        model: DiffusionModel,
        layers: Mapping[str, Layer],
        plan: NoisePlan,
        block: SampleBlock,
        projection: Projection,
        micro_batch: MicroBatch,
    ) -> Tensor:
        """Return the features of training samples, (n, flips, d); d is the projection's size, times T by timestep."""
        import torch

        if not self.each_timestep:
            return torch.cat(list(_projected(model, layers, plan, block, projection, micro_batch)))
        found = []
        values = plan.timestep_values(model.schedule.train_timesteps)
        for timestep, weight in zip(values.tolist(), plan.timestep_weights(len(values)).tolist(), strict=True):
            here = replace(plan, timesteps=(timestep,), weights=None)
            each = torch.cat(list(_projected(model, layers, here, block, projection, micro_batch, unit=True)))
            found.append(each * (weight / len(values)) ** 0.5)
        return torch.cat(found, dim=2)

    def of_gradient(self, gradient: Mapping[str, Tensor], projection: Projection) -> Tensor:
        """Return the feature of one gradient, (d,), from its matrices (d_out, d_in) by layer."""
        return projection.of((name, each.flatten()[None]) for name, each in gradient.items())[0]

    def scores(self, queries: Tensor, samples: Tensor) -> Tensor:
        """Return scores, (queries, n) float64, of features (queries, d) and (n, flips, d): the larger of the flips."""
        return (queries @ samples.flatten(0, 1).T.to(queries.dtype)).double().unflatten(1, samples.shape[:2]).amax(2)


KERNEL_TEACHERS: dict[str, KernelTeacher] = {
    # Park et al. (2023), with the dimensions of Wang et al. (2025); lambda 0 as in MadryLab/trak.
    "trak": KernelTeacher(Objective.loss, 16_384, ridge=0.0),
    # Zheng et al. (2024) and sail-sg/D-TRAK: mean square of the output, lambda 500.
    "d_trak": KernelTeacher(Objective.output_norm, 32_768, ridge=500.0),
    # Georgiev et al. (2023) and MadryLab/journey-TRAK: fresh noise on the clean image predicted at each step.
    "journey_trak": KernelTeacher(Objective.loss, 16_384, ridge=0.0, journey=True),
    # Pruthi et al. (2020), with the random projection of their section 4.
    "tracin": KernelTeacher(Objective.loss, 32_768),
    # Lin et al. (2024) and huawei-lin/DMin.
    "dmin": KernelTeacher(Objective.loss, 65_536, each_timestep=True),
}


def journey_gradient(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    clean: Tensor,
    timesteps: Tensor,
    condition: Condition,
    *,
    owner: int,
    seed: int,
    pairs: int,
    micro_batch: MicroBatch,
) -> dict[str, Tensor]:
    """Return the mean gradient of losses at the steps of a query's generation, by layer name (d_out, d_in).

    Every step has the same number of fresh noises, `pairs` together or a little more. Source: MadryLab/journey-TRAK,
    whose noise is added to the clean image that the sampler predicts at that step.

    Args:
        model: the frozen model.
        layers: whose gradients are wanted.
        clean: predicted at each step, (steps, c, h, w).
        timesteps: of each step, (steps,).
        condition: of the caption, one row.
        owner: a number that stands for the query in the noise stream, in [0, 2^48).
        seed: of the noise stream.
        pairs: how many (step, noise) pairs.
        micro_batch: pairs per forward.
    """
    import torch

    from fastgda_core.diffusion.noise import stream_key
    from fastgda_core.teachers.unlearning import mean_gradients

    step = torch.arange(len(timesteps), device=model.device).repeat_interleave(-(-pairs // len(timesteps)))
    key = stream_key(seed, "journey noise")
    with torch.no_grad():
        found = mean_gradients(
            model, layers, clean[step], condition, timesteps[step], key, owner, groups=1, micro_batch=micro_batch
        )
    return {name: gradient[0] for name, gradient in found.items()}


def _projected(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    projection: Projection,
    micro_batch: MicroBatch,
    unit: bool = False,
) -> Iterator[Tensor]:
    """Yield the features of some samples at a time, (some, flips, d), of gradients of length 1 where asked."""
    from fastgda_core.teachers.sample_gradients import sample_gradients

    for start in range(0, len(block.train_ids), _HELD):
        few = block.samples(slice(start, start + _HELD))
        for some in sample_gradients(model, layers, plan, few, micro_batch):
            yield _feature(some, list(layers), projection, unit).unflatten(0, (-1, block.flips))


def _feature(some: SampleGradients, names: Sequence[str], projection: Projection, unit: bool) -> Tensor:
    """Return projections of some gradients, (n, d), layer by layer; of these divided by their lengths where asked."""
    import torch

    squares: list[Tensor] = []

    def layer_by_layer() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            gradient = some.of(name)
            if unit:
                squares.append(gradient.square().sum(1))
            yield name, gradient

    found = projection.of(layer_by_layer())
    return found / torch.stack(squares).sum(0).sqrt().clamp_min(_NO_LENGTH)[:, None] if unit else found
