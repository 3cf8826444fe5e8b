"""Counterfactual judges: models that were trained again without the images which a method named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """A mean over queries with its standard error, and how it stands among other methods.

    place: "best", "close" (within one standard error of the best, by the best one's error) or "".
    """

    mean: float
    standard_error: float
    place: str = ""


def loss_changes(losses: Tensor, before: Tensor) -> Tensor:
    """Return how much a removal raised each query's loss, as a share of the loss before, (queries,) float64.

    Args:
        losses: (draws, queries), by (timestep, noise) draw, of the model trained without the named images.
        before: of the model that nothing was removed from, the same draws.
    """
    after, base = losses.double().mean(0), before.double().mean(0)
    return (after - base) / base


def compared(means: Mapping[str, tuple[float, float]], *, higher: bool = True) -> dict[str, Change]:
    """Return the mean of each method with its standard error, the best of them marked, and those close to it.

    Args:
        means: (mean over queries, its standard error) by method.
        higher: a higher value is better.
    """
    sign = 1 if higher else -1
    best = max(means, key=lambda name: sign * means[name][0])
    most, error = means[best]

    def place(value: float) -> str:
        behind = sign * (most - value)
        return "best" if behind == 0 else "close" if behind <= error else ""

    return {name: Change(value, mine, place(value)) for name, (value, mine) in means.items()}


def separation(targets: Tensor, controls: Tensor) -> float:
    """Return the share of (target, control) pairs in which the target's loss rose more; ties count half.

    The area under the receiver operating characteristic, as the Mann-Whitney statistic (Hanley & McNeil, 1982). One
    retraining without the images named for many targets tells how far they were hurt, and others were not.

    Args:
        targets: (t,) changes of the queries whose images were removed.
        controls: (c,) changes of other queries under the same model.
    """
    above = targets[:, None].double() - controls[None].double()
    return float(((above > 0).double() + (above == 0).double() / 2).mean())


def union_of_first(scores: Tensor, count: int) -> Tensor:
    """Return the samples that are among the first `count` of any query, ascending, as numbers of columns.

    Args:
        scores: (queries, samples).
    """
    return torch.unique(scores.topk(min(count, scores.shape[1]), dim=1).indices)
