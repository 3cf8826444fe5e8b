"""The models that were trained again on random subsets, as judges read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.teaching.retrainings import RetrainingParts
from tasks.teaching.run import Run


@dataclass(frozen=True, eq=False)
class RetrainedPool:
    """What models were trained on, and what they know of the queries.

    kept: (models, samples) bool; losses: (models, queries).
    again: (models, queries), of the first subsets from another seed; None where none was trained a second time.
    """

    kept: Tensor
    losses: Tensor
    again: Tensor | None

    @classmethod
    def of(cls, run: Run) -> RetrainedPool:
        """Read the pool of a run, which is complete."""
        parts = run.parts[RetrainingParts.kind]
        assert isinstance(parts, RetrainingParts)
        config, samples = parts.config, run.artifacts["samples"].rows
        losses = {each: parts.losses(number).mean(0) for number, each in enumerate(parts.pool)}
        subsets = [each for each in parts.pool if each.subset is not None and each.seed == config.seed]
        again = [losses[each] for each in parts.pool if each.seed != config.seed]
        return cls(
            torch.stack([each.kept(config, samples) for each in subsets]),
            torch.stack([losses[each] for each in subsets]),
            torch.stack(again) if again else None,
        )
