"""The bytes that the parts of a run read and write, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgda_core.teachers.registry import UNLEARNING_TEACHERS
from fastgda_core.teachers.scores import GROUPS
from tasks.config.pipeline import PipelineConfig
from tasks.execution.known import ModelShape
from tasks.teaching.cost import KindCost, Size, block_shape, score_shards

FLOAT = 4  # bytes; factors, updates and, by default, latents are float32
CAPTION, BESIDE = 60, 16  # bytes of a caption as text (a short sentence), and of a sample's own numbers, beside latents
SCORE_ROW = 7  # bytes of a row of scores or of base losses in Parquet (6.3 to 6.9 in the demo's and the judge's)


@dataclass(frozen=True)
class Bytes:
    """Bytes that one kind of part reads and writes, all its parts together."""

    read: float
    written: float

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.read + other.read, self.written + other.written)


class Traffic:
    """Bytes by kind of part of an unlearning teacher; of other kinds nothing is known."""

    def __init__(self, config: PipelineConfig, size: Size, shape: ModelShape, image_bytes: float) -> None:
        self.config, self.size, self.shape, self.image_bytes = config, size, shape, image_bytes
        numbers = config.model.images * shape.latent
        self.sample = numbers * (2 if config.model.latents == "bf16" else FLOAT) + size.captions * CAPTION + BESIDE
        self.update = FLOAT * shape.layer_weights

    def latents(self) -> Bytes:
        """Return those of latents, made of the images in their tars; each has its captions beside it."""
        return Bytes(self.size.samples * self.image_bytes, self.size.samples * self.sample)

    def of(self, cost: KindCost) -> Bytes | None:
        """Return those of one kind; None where its sizes are not known."""
        if self.config.teacher.name not in UNLEARNING_TEACHERS:
            return None
        rows, factors = cost.rows, FLOAT * self.shape.fisher_numbers
        samples, losses = rows * self.sample, rows * self.config.model.images * SCORE_ROW
        known = {
            "curvature": Bytes(samples, factors),
            "unlearning steps": Bytes(factors, rows * self.update),
            "noise plan": Bytes(samples, 0.0),
            "base losses": Bytes(samples, losses),
            "sketch basis": Bytes(samples, 0.0),
            "sketches": Bytes(samples if cost.forwards else 0.0, cost.kept_bytes),
        }
        kind = cost.kind.split(" of checkpoint")[0]
        return self._scores(cost) if kind == "scores" else known.get(kind)

    def _scores(self, cost: KindCost) -> Bytes:
        """Return those of all score shards: samples, and the updates that do not stay on the device between two."""
        written = cost.rows * SCORE_ROW
        places = max(1, len(self.config.teacher.checkpoints))
        if not UNLEARNING_TEACHERS[self.config.teacher.name].first_order:
            each = self.size.candidates * self.sample + places * self.update
            return Bytes(self.size.queries * each, written)
        shards, seen = score_shards(self.config, self.size)
        queries = min(block_shape(self.config, self.size.queries)[0], self.size.queries)
        stay = queries <= self.config.teacher.loaded_queries
        loads = -(-self.size.queries // queries) if stay else shards
        return Bytes(seen * self.sample + places * loads * queries * self.update, written)


def contracted(config: PipelineConfig, size: Size, shape: ModelShape) -> float:
    """Return what the products of first-order scores take, in forward passes of as many FLOPs.

    Every sample that is run is multiplied with every update of its shard's queries, one product for each image and for
    each group of draws that tells a standard error.
    """
    teacher = config.teacher
    if teacher.name not in UNLEARNING_TEACHERS or not UNLEARNING_TEACHERS[teacher.name].first_order:
        return 0.0
    _, seen = score_shards(config, size)
    queries = min(block_shape(config, size.queries)[0], size.queries)
    groups = min(GROUPS, teacher.draws // (2 if teacher.antithetic else 1))
    places = max(1, len(teacher.checkpoints))
    return places * seen * queries * config.model.images * groups * 2 * shape.layer_weights / shape.flops


def total(several: Sequence[Bytes | None]) -> Bytes:
    """Return the sum of those that are known."""
    return sum((each for each in several if each is not None), Bytes(0.0, 0.0))
