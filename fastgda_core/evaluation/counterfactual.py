"""Counterfactual judges: models that were trained again without the images which a method named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def lead(changes: Tensor, others: Tensor) -> Tensor:
    """Return how much further one removal raised each query's loss than another, (queries,) float64.

    The logarithm of the losses' ratio: the mean of it is not that of the one query whose loss rose twelvefold.

    Args:
        changes: (queries,), of `loss_changes`.
        others: of another removal, the same queries.
    """
    return torch.log1p(changes.double()) - torch.log1p(others.double())


def above_chance(changes: Tensor, random: Tensor) -> Tensor:
    """Return which queries lost more than by chance: above mean + 2 standard deviations of random removals.

    The deviation of a removal, and not the error of the mean: one in forty random removals would lie above it.

    Args:
        changes: (queries,), of one removal each.
        random: (removals, queries), at least two, each of as many samples.
    """
    return changes.double() > random.double().mean(0) + 2 * random.double().std(0)


def smallest(counts: Sequence[int], broken: Tensor) -> Tensor:
    """Return the smallest count at which each query is broken, (queries,) float64; infinity where it never is.

    Source: Park et al., TRAK (2023), whose brittleness test looks for the smallest set that changes an output.

    Args:
        counts: ascending.
        broken: (counts, queries) bool.
    """
    found = torch.full((broken.shape[1],), torch.inf, dtype=torch.float64)
    for count, row in zip(reversed(counts), broken.flip(0), strict=True):
        found[row] = count
    return found


def pixel_mse(pictures: Tensor, others: Tensor) -> Tensor:
    """Return the mean squared difference of pairs of pictures over pixels and colours, (n,) float64, in [0, 1].

    Args:
        pictures: (n, h, w, colours) bytes, which stand for 0 to 1.
        others: the same.
    """
    return ((pictures.double() - others.double()) / 255).square().flatten(1).mean(1)


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


def separation(targets: Tensor, controls: Tensor) -> tuple[float, float]:
    """Return the share of (target, control) pairs in which the target's loss rose more, and its standard error.

    Ties count half. The share is the area under the receiver operating characteristic, as the Mann-Whitney statistic
    (Hanley & McNeil, 1982), the error is over targets and controls (DeLong et al., 1988); 0 where either is one alone.
    One retraining without the images named for many targets tells how far they were hurt, and others were not.

    Args:
        targets: (t,) changes of the queries whose images were removed.
        controls: (c,) changes of other queries under the same model.
    """
    above = targets[:, None].double() - controls[None].double()
    won = (above > 0).double() + (above == 0).double() / 2
    variance = sum(won.mean(other).var() / won.shape[1 - other] for other in (0, 1)) if min(won.shape) > 1 else 0.0
    return float(won.mean()), float(variance) ** 0.5


def union_of_first(scores: Tensor, count: int) -> Tensor:
    """Return the samples that are among the first `count` of any query, ascending, as numbers of columns.

    Args:
        scores: (queries, samples).
    """
    return torch.unique(scores.topk(min(count, scores.shape[1]), dim=1).indices)
