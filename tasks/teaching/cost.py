"""The cost of a run, in forward passes of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.config.pipeline import PipelineConfig


@dataclass(frozen=True)
class Size:
    """The size of a run: training samples, captions of one, queries, candidates of one query."""

    samples: int
    captions: float
    queries: int
    candidates: int


@dataclass(frozen=True)
class KindCost:
    """The cost of one kind of part: number of parts, their rows, their forward passes, what they keep for answers.

    measured: seconds that one part took, where they were measured and no count of forward passes says them.
    unknown: the forward passes are the least part of the work, and nothing tells how long the rest takes.
    contraction: products of gradients with all queries' updates, as long as so many forward passes of equal FLOPs.
    """

    kind: str
    parts: int
    rows: int
    forwards: float
    kept_bytes: int = 0
    measured: float | None = None
    unknown: bool = False
    contraction: float = 0.0

    def seconds(self, rate: float) -> float:
        """Return the seconds of one device that makes `rate` forward passes a second."""
        if self.measured is not None:
            return self.parts * self.measured
        return (self.forwards + self.contraction) / rate


def scores_of(costs: Sequence[KindCost]) -> KindCost:
    """Return the cost of the score shards among those of a run."""
    return next(cost for cost in costs if cost.kind == "scores")


def block_shape(config: PipelineConfig, queries: int) -> tuple[int, int]:
    """Return queries and training samples of a score shard, for a teacher that scores many queries in one pass."""
    return config.teacher.shard_queries or queries, config.teacher.shard_samples


def score_shards(config: PipelineConfig, size: Size) -> tuple[int, int]:
    """Return the number of shards, each a block of queries and of samples, and the samples looked at in all of them."""
    queries, samples = block_shape(config, size.queries)
    block = min(queries, size.queries)
    blocks = -(-size.queries // block)
    # The pool of a block is what any of its queries is scored against; its size lies between these two.
    pool = min(size.samples, block * size.candidates) if config.candidates.policy != "all" else size.samples
    return blocks * -(-pool // samples), blocks * pool
