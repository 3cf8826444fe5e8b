"""How often a run encodes captions, from sizes alone: latents are kept, embeddings are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgda_core.teachers.registry import UNLEARNING_TEACHERS
from tasks.config.pipeline import PipelineConfig
from tasks.execution.known import ModelShape
from tasks.teaching.cost import KindCost, Size, score_shards

FLOAT = 4  # bytes
_ONCE_A_ROW = ("noise plan", "base losses", "sketch basis", "sketches")


@dataclass(frozen=True)
class Encodings:
    """Captions of all samples, how many of them a process keeps encoded, and how often one is encoded at most.

    passes: forward passes of the denoiser of as many FLOPs, beside those that a plan counts.
    """

    captions: int
    kept: int
    encoded: float
    passes: float

    @classmethod
    def of(cls, config: PipelineConfig, size: Size, shape: ModelShape, costs: Sequence[KindCost]) -> Encodings | None:
        """Return those of an unlearning teacher's run; None of others."""
        if config.teacher.name not in UNLEARNING_TEACHERS:
            return None
        captions = round(size.samples * size.captions)
        kept = int(config.model.captions_gb * 1e9 / (FLOAT * shape.condition))
        if kept >= captions:
            encoded = float(captions)
        else:
            places = max(1, len(config.teacher.checkpoints))
            first_order = UNLEARNING_TEACHERS[config.teacher.name].first_order
            pairs = score_shards(config, size)[1] if first_order else size.queries * size.candidates
            rows = dict.fromkeys((*_ONCE_A_ROW, "curvature"), 0)
            for cost in costs:
                if (kind := cost.kind.split(" of checkpoint")[0]) in rows and cost.forwards:
                    rows[kind] += cost.rows
            first = rows.pop("curvature")  # by the first caption of each
            encoded = first + size.captions * (places * pairs + sum(rows.values()))
        return cls(captions, kept, encoded, encoded * shape.caption_flops / shape.flops)

    def told(self) -> str:
        """Return this in one line."""
        if self.kept >= self.captions:
            how = f"each of the {self.captions:,} once a process, which keeps them (model.captions_gb)"
        else:
            how = (
                f"{self.encoded:,.0f} times at most, as model.captions_gb keeps {self.kept:,} of {self.captions:,} in "
                "a process"
            )
        return f"captions are encoded where they are used, {how}: FLOPs of {self.passes:,.0f} more forward passes"
