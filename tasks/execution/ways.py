"""The same answers by other ways of work: exact scores, first-order scores, and sketches, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fastgda_core.diffusion.precision import Precision
from fastgda_core.teachers.needs import GRADIENT_FORWARDS
from fastgda_core.teachers.registry import UNLEARNING_TEACHERS
from tasks.config.pipeline import PipelineConfig
from tasks.config.teaching import SketchesConfig
from tasks.execution.known import ModelShape
from tasks.execution.traffic import Traffic, contracted, total
from tasks.teaching.cost import KindCost, Size
from tasks.teaching.families import family_of

Speed = Callable[[Precision], float]  # forward passes a second in a precision


@dataclass(frozen=True)
class Way:
    """One way of work over the same data and noise plan, from latents to scores or sketches.

    contraction: in forwards, as in `KindCost`. seconds: of one device.
    """

    name: str
    forwards: float
    contraction: float
    read_bytes: float
    written_bytes: float
    seconds: float


def ways(
    config: PipelineConfig, size: Size, shape: ModelShape, image_bytes: float, speed: Speed, *, products: bool
) -> list[Way]:
    """Return exact, first-order and sketch work of an unlearning teacher's configuration; of others nothing.

    Exact work keeps to float32.

    Args:
        config: with the noise plan that counts.
        products: those with the queries' updates take time beside what `speed` tells.
    """
    if config.teacher.name not in UNLEARNING_TEACHERS:
        return []
    exact = config.teacher.precision if config.teacher.precision.exact else Precision.float32
    variants = [
        ("exact", _with(config, "abu_plus", exact, None)),
        ("first order", _with(config, "abu_plus_first_order", config.teacher.precision, None)),
        ("sketch", _with(config, "abu_plus_first_order", config.teacher.precision, config.sketches)),
    ]
    return [_way(name, variant, size, shape, image_bytes, speed, products) for name, variant in variants]


def _with(
    config: PipelineConfig, teacher: str, precision: Precision, sketches: SketchesConfig | None
) -> PipelineConfig:
    changed = config.teacher.model_copy(update={"name": teacher, "precision": precision})
    return config.model_copy(update={"teacher": changed, "sketches": sketches, "exact_check": None})


def _way(
    name: str,
    config: PipelineConfig,
    size: Size,
    shape: ModelShape,
    image_bytes: float,
    speed: Speed,
    products: bool,
) -> Way:
    if name == "sketch":
        config = config.model_copy(update={"sketches": config.sketches or SketchesConfig()})
    kinds = family_of(config).costs(config, size)
    contraction = 0.0
    if name == "sketch":
        kinds = list(_sketching(config, kinds, size))
    elif name == "first order" and products:
        contraction = contracted(config, size, shape)
    traffic = Traffic(config, size, shape, image_bytes)
    moved = total([traffic.latents(), *(traffic.of(kind) for kind in kinds)])
    forwards = sum(kind.forwards for kind in kinds)
    seconds = (forwards + contraction) / speed(config.teacher.precision)
    return Way(name, forwards, contraction, moved.read, moved.written, seconds)


def _sketching(config: PipelineConfig, kinds: Sequence[KindCost], size: Size) -> Iterator[KindCost]:
    """Yield the parts without scores: sketches are made by a pass over all samples of their own then."""
    noises = config.teacher.timestep_count * config.teacher.draws * config.model.images * size.captions
    for kind in kinds:
        if kind.kind == "sketches":
            yield replace(kind, forwards=size.samples * noises * GRADIENT_FORWARDS)
        elif kind.kind != "scores":
            yield kind
