"""How many forward passes of the denoiser each kind of part takes."""

from __future__ import annotations

from dataclasses import dataclass

from fastgda_core.teachers.registry import TEACHERS
from tasks.config.pipeline import PipelineConfig
from tasks.teaching.base_losses import BASE_LOSS_PART
from tasks.teaching.curvature import pilot_rows

GRADIENT_FORWARDS = 2.1  # one forward and backward to the chosen layers, in forwards (benchmarks/RESULTS.md)
# Of one row, in forwards: kronfluence's pass; for EK-FAC a pass for the eigenvalues after it.
FISHER_FORWARDS = {"diagonal": 3.0, "ekfac": 3.0 + GRADIENT_FORWARDS}


@dataclass(frozen=True)
class Size:
    """How much there is: training samples, captions of one, queries, candidates of one query."""

    samples: int
    captions: float
    queries: int
    candidates: int


@dataclass(frozen=True)
class KindCost:
    """One kind of part: how many, what they hold, how many forward passes they take."""

    kind: str
    parts: int
    rows: int
    forwards: float

    def seconds(self, rate: float) -> float:
        return self.forwards / rate


def costs(config: PipelineConfig, size: Size) -> list[KindCost]:
    """Forward passes of each kind of part of a run, from the configuration and the numbers of samples alone."""
    teacher, queries = config.teacher, size.queries
    timesteps = len(teacher.timestep_list) if teacher.timestep_list is not None else teacher.timesteps
    noises = timesteps * teacher.draws * (2 if config.model.flips else 1) * size.captions
    method = TEACHERS[teacher.name]
    pairs = queries * size.candidates
    rows, pilot = config.curvature.samples, pilot_rows(config.curvature) * GRADIENT_FORWARDS
    found = [
        KindCost("curvature", 1, rows, rows * FISHER_FORWARDS[method.fisher] + pilot),
        KindCost("unlearning steps", queries, queries, queries * teacher.gradient_pairs * GRADIENT_FORWARDS),
    ]
    if not method.first_order:
        found.append(KindCost("base losses", -(-size.samples // BASE_LOSS_PART), size.samples, size.samples * noises))
        return [*found, KindCost("scores", queries, pairs, pairs * noises)]
    block = min(teacher.shard_queries or queries, queries)
    blocks = -(-queries // block)
    # The pool of a block is what any of its queries is scored against; its size lies between these two.
    pool = min(size.samples, block * size.candidates) if config.candidates.policy != "all" else size.samples
    shards = blocks * -(-pool // teacher.shard_samples)
    return [*found, KindCost("scores", shards, pairs, blocks * pool * noises * GRADIENT_FORWARDS)]
