"""Which models a judge trains again: on what, from which seed, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.evaluation.retraining import random_subset
from storage_schemas.commit import input_key
from tasks.config.judging import JudgeConfig


@dataclass(frozen=True)
class Retraining:
    """A model that is trained again.

    seed: of weights and draws; subset: number of the random subset that it is trained on; else on all but `removed`.
    """

    seed: int
    subset: int | None = None
    removed: tuple[int, ...] = ()

    @property
    def draws_again(self) -> bool:
        """Whether it generates the queries' pictures where these are asked for: random subsets say nothing by them."""
        return self.subset is None

    def kept(self, config: JudgeConfig, samples: int) -> Tensor:
        """Return which samples it is trained on, (samples,) bool."""
        if self.subset is not None:
            return random_subset(samples, self.subset, seed=config.seed, share=config.share)
        kept = torch.ones(samples, dtype=torch.bool)
        kept[list(self.removed)] = False
        return kept

    def id(self, config: JudgeConfig, samples: int) -> str:
        """Return a hash of the removed samples and the seed: who asks for the same gets the same."""
        removed = (~self.kept(config, samples)).nonzero().flatten().tolist()
        return input_key("retraining", removed, self.seed)


@dataclass(frozen=True)
class Reason:
    """Why a model is trained without some samples.

    method: that named them, "subset" where they were drawn; k: first samples of each query; query_id: the only query
    that they were named for, empty where there are several.
    """

    method: str = ""
    k: int = 0
    query_id: str = ""


def pool_of(config: JudgeConfig) -> list[Retraining]:
    """Return the models of a pool: of all samples, of each subset, and of some of them from another seed."""
    first, second = config.seed, config.seed + 1
    subsets = [Retraining(first, number) for number in range(config.subsets)]
    return [Retraining(first), *subsets, *(Retraining(second, number) for number in range(config.again))]
