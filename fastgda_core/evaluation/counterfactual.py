"""Counterfactual judges: models that were trained again without the images which a method named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """A mean over queries with its standard error, and how it stands among other methods.

    place: "best", "close" (within one standard error of the best) or "".
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


def compared(values: Mapping[str, Tensor], *, higher: bool = True) -> dict[str, Change]:
    """Return mean and standard error over queries of each method, the best of them marked.

    Args:
        values: (queries,) by method.
        higher: a higher value is better.
    """
    means = {name: float(each.double().mean()) for name, each in values.items()}
    errors = {
        name: float(each.double().std() / len(each) ** 0.5) if len(each) > 1 else 0.0 for name, each in values.items()
    }
    sign = 1 if higher else -1
    best = max(means, key=lambda name: sign * means[name])

    def place(name: str) -> str:
        if name == best:
            return "best"
        return "close" if sign * (means[best] - means[name]) <= errors[best] else ""

    return {name: Change(means[name], errors[name], place(name)) for name in values}


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
