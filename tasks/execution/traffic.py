"""The bytes that the parts of a run read and write, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgda_core.teachers.registry import UNLEARNING_TEACHERS
from fastgda_core.teachers.scores import GROUPS
from tasks.config.pipeline import PipelineConfig
from tasks.execution.known import ModelShape
from tasks.teaching.cost import KindCost, Size, block_shape, score_shards
from tasks.teaching.latent_rows import LATENT_PART_SAMPLES

FLOAT = 4  # bytes; latents, embeddings, factors and updates are float32
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
        numbers = config.model.images * shape.latent + size.captions * shape.condition
        self.sample = FLOAT * numbers
        self.update = FLOAT * shape.layer_weights

    def latents(self) -> Bytes:
        """Return those of latents and caption embeddings, made of the images in their tars."""
        return Bytes(self.size.samples * self.image_bytes, self.size.samples * self.sample)

    def of(self, cost: KindCost) -> Bytes | None:
        """Return those of one kind; None where its sizes are not known."""
        if self.config.teacher.name not in UNLEARNING_TEACHERS:
            return None
        rows, factors = cost.rows, FLOAT * self.shape.fisher_numbers
        losses = rows * self.config.model.images * SCORE_ROW
        known = {
            "curvature": Bytes(self._scattered(rows), factors),
            "unlearning steps": Bytes(factors, rows * self.update),
            "noise plan": Bytes(self._scattered(rows), 0.0),
            "base losses": Bytes(rows * self.sample, losses),
            "sketch basis": Bytes(self._scattered(rows), 0.0),
            "sketches": Bytes(rows * self.sample if cost.forwards else 0.0, cost.kept_bytes),
        }
        kind = cost.kind.split(" of checkpoint")[0]
        return self._scores(cost) if kind == "scores" else known.get(kind)

    def _scores(self, cost: KindCost) -> Bytes:
        """Return those of all score shards: samples, and the updates that do not stay on the device between two."""
        written = cost.rows * SCORE_ROW
        places = max(1, len(self.config.teacher.checkpoints))
        if not UNLEARNING_TEACHERS[self.config.teacher.name].first_order:
            each = self._scattered(self.size.candidates) + places * self.update
            return Bytes(self.size.queries * each, written)
        shards, seen = score_shards(self.config, self.size)
        queries = min(block_shape(self.config, self.size.queries)[0], self.size.queries)
        stay = queries <= self.config.teacher.loaded_queries
        loads = -(-self.size.queries // queries) if stay else shards
        if self.config.candidates.policy == "all":
            samples = seen * self.sample * max(1.0, LATENT_PART_SAMPLES / self.config.teacher.shard_samples)
        else:
            samples = shards * self._scattered(-(-seen // shards))
        return Bytes(samples + places * loads * queries * self.update, written)

    def _scattered(self, samples: int) -> float:
        """Return the bytes read for so many samples anywhere: whole parts, as `load_block` reads them."""
        return min(self.size.samples, samples * LATENT_PART_SAMPLES) * self.sample


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
