"""The linear datamodelling score: do summed scores predict the losses of models that were trained on subsets?

Source: Park et al., "TRAK: attributing model behavior at scale" (2023), definition 2.3; Ilyas et al., "Datamodels"
(2022), for the sum as a prediction. Its errors are two: queries are drawn, and so are the models, which queries share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.evaluation.ranking_metrics import spearman

RESAMPLED = 1000  # pools of a bootstrap interval
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Lds:
    """Rank correlation of a method's predictions with what retraining gave, or how far that is ahead of another's.

    by_query: (q,) float64.
    without: the mean without each model, (models,) float64.
    of_pools: the mean in pools that were drawn again from these models, the same pools for all methods.
    """

    by_query: Tensor
    without: Tensor
    of_pools: Tensor

    @property
    def mean(self) -> float:
        return float(self.by_query.mean())

    @property
    def over_queries(self) -> float:
        """Standard error of the mean by the queries' spread; 0 of a single query."""
        return float(self.by_query.std() / len(self.by_query) ** 0.5) if len(self.by_query) > 1 else 0.0

    @property
    def over_models(self) -> float:
        """Standard error of the mean by a jackknife over models."""
        models = len(self.without)
        return float(((models - 1) / models * (self.without - self.without.mean()).square().sum()).sqrt())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the means of the drawn pools."""
        low, high = self.of_pools.quantile(torch.tensor(INTERVAL, dtype=torch.float64))
        return float(low), float(high)

    def ahead_of(self, other: Lds) -> Lds:
        """Return this less another method's on the same queries, models and pools; its errors are of the pairs."""
        return Lds(self.by_query - other.by_query, self.without - other.without, self.of_pools - other.of_pools)


def linear_datamodelling(kept: Tensor, scores: Tensor, losses: Tensor, *, seed: int = 0) -> Lds:
    """Hold the scores of a method against the losses of retrained models.

    Args:
        kept: (models, samples) bool, what each was trained on.
        scores: (queries, samples); higher = more influential, so that training on it lowers the query's loss.
        losses: (models, queries), of each model on each query.
        seed: of the bootstrap.

    Raises:
        ValueError: there are fewer than three models, whose order says nothing.
    """
    predicted, truth = predictions(kept, scores), -losses.T.double()
    models = truth.shape[1]
    if models < 3:
        raise ValueError(f"{models} models have no order: retrain at least three")
    every, generator = torch.arange(models), torch.Generator().manual_seed(seed)
    drawn = [torch.randint(models, (models,), generator=generator) for _ in range(RESAMPLED)]

    def means(pools: Iterable[Tensor]) -> Tensor:
        return torch.stack([spearman(predicted[:, pool], truth[:, pool]).mean() for pool in pools])

    without = (every[every != model] for model in range(models))
    return Lds(spearman(predicted, truth), means(without), means(drawn))


def difference(kept: Tensor, scores: Tensor, other: Tensor, losses: Tensor, *, seed: int = 0) -> Lds:
    """Return the first method's score less that of another on the same queries and models, with errors of the pairs."""
    first, second = (linear_datamodelling(kept, each, losses, seed=seed) for each in (scores, other))
    return first.ahead_of(second)


def predictions(kept: Tensor, scores: Tensor) -> Tensor:
    """Return the sum of the scores of what each model was trained on, (queries, models) float64."""
    return scores.double() @ kept.double().T


def inclusion_effects(kept: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return what training on each sample did to the queries' losses, and its standard error, (queries, samples) each.

    It is the mean loss of the models that were trained on the sample less that of the others, as a share of the mean of
    all: below 0 where the sample helps. The error is Welch's; both are NaN where fewer than two models have the sample,
    or lack it.

    Args:
        kept: (models, samples) bool, what each was trained on.
        losses: (models, queries), of each model on each query.
    """
    shares = losses.double() / losses.double().mean(0)
    parts = []
    for members in (kept.double(), (~kept).double()):
        count = members.sum(0)
        count = count.masked_fill(count < 2, torch.nan)
        mean = shares.T @ members / count
        spread = (shares.T.square() @ members - count * mean.square()) / (count - 1)
        parts.append((mean, spread.clamp_min(0) / count))
    (with_it, error), (without, other) = parts
    return with_it - without, (error + other).sqrt()


def reliability(losses: Tensor, again: Tensor) -> Tensor:
    """Return the highest score that a method could have, by query, (q,) float64: what retraining itself leaves open.

    Args:
        losses: (models, queries).
        again: of models that were trained on the same subsets from another seed.

    Returns:
        the square root of the rank correlation of the two, which is that of either with losses free of the seed's noise
        (Spearman, "The proof and measurement of association between two things", 1904); 0 where they disagree.
    """
    return spearman(losses.T.double(), again.T.double()).clamp_min(0).sqrt()
