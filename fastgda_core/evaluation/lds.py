"""The linear datamodelling score: do summed scores predict the losses of models that were trained on subsets?

Source: Park et al., "TRAK: attributing model behavior at scale" (2023), definition 2.3; Ilyas et al., "Datamodels"
(2022), for the sum as a prediction. Its errors are two: queries are drawn, and so are the models, which queries share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.evaluation.ranking_metrics import spearman

RESAMPLED = 1000  # pools of a bootstrap interval
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Lds:
    """Rank correlation of a method's predictions with what retraining gave.

    by_query: (q,) float64.
    over_queries, over_models: standard errors of the mean, by the queries' spread and by a jackknife over models.
    interval: 95 % of the means of pools that were drawn again from these models.
    """

    by_query: Tensor
    over_queries: float
    over_models: float
    interval: tuple[float, float]

    @property
    def mean(self) -> float:
        return float(self.by_query.mean())


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
    return _judged(predictions(kept, scores), -losses.T.double(), seed)


def difference(kept: Tensor, scores: Tensor, other: Tensor, losses: Tensor, *, seed: int = 0) -> Lds:
    """Return the first method's score less that of another on the same queries and models, with errors of the pairs."""
    found = [predictions(kept, each) for each in (scores, other)]
    return _judged(torch.stack(found), -losses.T.double(), seed)


def predictions(kept: Tensor, scores: Tensor) -> Tensor:
    """Return the sum of the scores of what each model was trained on, (queries, models) float64."""
    return scores.double() @ kept.double().T


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


def _judged(predicted: Tensor, truth: Tensor, seed: int) -> Lds:
    """Judge predictions, (queries, models), or the first of two, (2, queries, models), against the second."""
    models = truth.shape[1]
    if models < 3:
        raise ValueError(f"{models} models have no order: retrain at least three")
    whole = _correlations(predicted, truth)
    every = torch.arange(models)
    without = torch.stack([_means(predicted, truth, every[every != model]) for model in range(models)])
    jackknife = ((models - 1) / models * (without - without.mean()).square().sum()).sqrt()
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(models, (models,), generator=generator) for _ in range(RESAMPLED)]
    low, high = torch.stack([_means(predicted, truth, some) for some in drawn]).quantile(
        torch.tensor(INTERVAL, dtype=torch.float64)
    )
    over_queries = whole.std() / len(whole) ** 0.5 if len(whole) > 1 else torch.zeros(())
    return Lds(whole, float(over_queries), float(jackknife), (float(low), float(high)))


def _means(predicted: Tensor, truth: Tensor, models: Tensor) -> Tensor:
    return _correlations(predicted[..., models], truth[:, models]).mean()


def _correlations(predicted: Tensor, truth: Tensor) -> Tensor:
    if predicted.ndim == 2:
        return spearman(predicted, truth)
    return spearman(predicted[0], truth) - spearman(predicted[1], truth)
