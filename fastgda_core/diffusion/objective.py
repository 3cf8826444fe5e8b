"""Objectives, from whose gradients the teachers make their scores."""

from __future__ import annotations

from enum import StrEnum

RATIO_EPSILON = 1e-3  # sony/mucs: keeps a loss near 0 from deciding a mean of ratios


class Objective(StrEnum):
    """A function of one forward, whose gradients at query and training sample are compared.

    loss: of output - target, as in training. A score says which sample's removal would raise the query's loss.
    output_norm: of the output alone. A score says which sample's removal would change what the model draws. At the
        weights that drew a picture little of its loss is left, and the sign of that rest is close to chance; the output
        itself is not small there.
    ratio: half the logarithm of the loss, at training samples alone: the change of a sample's loss is held against its
        size, for each (timestep, noise) by itself. The query is unlearned by its loss, as with `loss`.

    Source of output_norm: Zheng et al., "Intriguing properties of data attribution on diffusion models" (2024), who
    differentiate other functions of a diffusion model's output in place of its loss. Source of ratio: MUCS
    (arXiv 2605.17938), whose score is the mean over noise of (L_u - L_t) / (L_u + L_t + epsilon): to second order the
    difference of log(L + epsilon / 2) / 2.
    """

    loss = "loss"
    output_norm = "output_norm"
    ratio = "ratio"

    @property
    def of_query(self) -> Objective:
        """The objective by which a query is unlearned."""
        return Objective.loss if self is Objective.ratio else self
