"""Losses of the rank head: its cosines against the teacher's ranking.

A loss of pairs takes the outputs of the head's affine map, (q, s, outputs), and labels, (q, s), and returns the loss of
each pair, (q, s); `rank_loss` takes the mean over the pairs that have a label. A loss of lists compares the samples of
a query with each other, and takes the mean itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.ranking.loss_names import LossName

ORDINAL_BINS = 10


def bce(outputs: Tensor, label: Tensor) -> Tensor:
    """Return the binary cross-entropy of sigmoid(scale * cos + bias) against the rank label pi."""
    return F.binary_cross_entropy_with_logits(outputs[..., 0], label, reduction="none")


def mse(outputs: Tensor, label: Tensor) -> Tensor:
    """Return the squared error of sigmoid(scale * cos + bias) against the rank label pi."""
    return (outputs[..., 0].sigmoid() - label).square()


def ordinal(outputs: Tensor, label: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of 9 heads, each of which says whether pi lies above its bin's upper end.

    Source: Niu et al., "Ordinal regression with multiple output CNN for age estimation" (2016); bins of equal width.
    """
    thresholds = torch.arange(1, ORDINAL_BINS, device=label.device) / ORDINAL_BINS
    above = (label[..., None] > thresholds).to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs, above, reduction="none").mean(-1)


def regression(outputs: Tensor, label: Tensor) -> Tensor:
    """Return the squared error of scale * cos + bias against the score, standardised within its query."""
    return (outputs[..., 0] - label).square()


def listwise(outputs: Tensor, label: Tensor, known: Tensor, offset: float | None) -> Tensor:
    """Return the cross-entropy between the teacher's and the head's distribution over a query's samples of the batch.

    ListNet's top-one probabilities (Cao et al., "Learning to rank: from pairwise approach to listwise approach", 2007)
    with gains 1 / (pi + offset), which fall with the rank as those of mAP and NDCG do; non-candidates have the least.

    Args:
        outputs: (q, s), falling with the similarity.
        label: (q, s), pi.
        known: (q, s) bool, the pairs that have a label.
        offset: of the gains; None: 0.02.
    """
    gains = known / (label + (offset or 0.02))
    target = gains / gains.sum(1, keepdim=True).clamp_min(torch.finfo(gains.dtype).tiny)
    log_probability = torch.log_softmax((-outputs).masked_fill(~known, torch.finfo(outputs.dtype).min), dim=1)
    return -(target * log_probability).sum() / len(label)


@dataclass(frozen=True)
class RankLoss:
    """A loss and what it needs.

    of_pairs: the loss of each pair, (q, s), from outputs, (q, s, outputs), and labels, (q, s).
    of_lists: in its place, the mean loss of a batch from the first output, (q, s), labels, which of them are known, and
        the rank offset: of a loss that compares the samples of a query.
    outputs: affine maps of the cosine.
    scale: initial scale of these maps, negative where a high cosine means a low label.
    standardised_scores: labels are standardised scores and not rank labels.
    """

    of_pairs: Callable[[Tensor, Tensor], Tensor] | None = None
    of_lists: Callable[[Tensor, Tensor, Tensor, float | None], Tensor] | None = None
    outputs: int = 1
    scale: float = -5.0
    standardised_scores: bool = False


LOSSES: dict[str, RankLoss] = {
    "bce": RankLoss(bce),
    "mse": RankLoss(mse),
    "ordinal": RankLoss(ordinal, outputs=ORDINAL_BINS - 1),
    "regression": RankLoss(regression, scale=1.0, standardised_scores=True),
    "listwise": RankLoss(of_lists=listwise),
}


def rank_loss(name: LossName, outputs: Tensor, label: Tensor, rank_offset: float | None) -> Tensor:
    """Return the mean loss of a batch, a scalar.

    Args:
        name: of `LOSSES`.
        outputs: (q, s, outputs), the affine maps of the cosines.
        label: (q, s), NaN where a pair has none.
        rank_offset: weighs a pair by 1 / (label + rank_offset), so that the top of the ranking counts most; None: all
            alike. For "listwise" the offset of the gains, 0.02 where it is None.
    """
    known = ~label.isnan()
    label = torch.where(known, label, 1.0)
    loss = LOSSES[name]
    if loss.of_lists is not None:
        return loss.of_lists(outputs[..., 0], label, known, rank_offset)
    assert loss.of_pairs is not None
    weight = known if rank_offset is None or loss.standardised_scores else known / (label + rank_offset)
    return (loss.of_pairs(outputs, label) * weight).sum() / weight.sum()
