"""Ensembles: standardised sums of the methods that are best on the validation queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgda_core.evaluation.lds import predictions
from fastgda_core.evaluation.ranking_metrics import spearman

SIZES = (2, 3)  # of methods that are added up
BEST = "best "  # how the names begin


def chosen_members(
    scores: Mapping[str, Tensor], kept: Tensor, losses: Tensor, validation: Sequence[int]
) -> dict[str, list[str]]:
    """Choose the best two and the best three methods by their LDS on the validation queries, and on nothing else.

    Args:
        scores: of the methods that may be members, (queries, samples) each.
        kept: (models, samples) bool, what each model was trained on.
        losses: (models, queries).
        validation: numbers of the validation queries.

    Returns:
        Members, best first, by the ensemble's name; none where there is nothing to choose by.
    """
    if not validation:
        return {}
    asked = list(validation)
    truth = -losses[:, asked].T.double()
    judged = {name: spearman(predictions(kept, each[asked]), truth).mean().item() for name, each in scores.items()}
    best = sorted(judged, key=lambda name: -judged[name])
    return {f"{BEST}{size}: {'; '.join(best[:size])}": best[:size] for size in SIZES if len(best) >= size}


def ensemble_sum(several: Sequence[Tensor]) -> Tensor:
    """Add up methods, each query's scores divided by their standard deviation over the samples.

    Scores of one query that are all alike say nothing, and count as 0.

    Args:
        several: (queries, samples) each, float64.
    """
    total = torch.zeros_like(several[0])
    for scores in several:
        deviation = scores.std(dim=1, correction=0, keepdim=True)
        alike = scores.amax(dim=1, keepdim=True) == scores.amin(dim=1, keepdim=True)
        total += torch.where(alike, 0.0, scores / deviation)
    return total
