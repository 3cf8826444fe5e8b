"""Objectives, from whose gradients the teachers make their scores."""

from __future__ import annotations

from enum import StrEnum


class Objective(StrEnum):
    """A squared norm, whose gradients at query and training sample are compared.

    loss: of output - target, as in training. A score says which sample's removal would raise the query's loss.
    output_norm: of the output alone. A score says which sample's removal would change what the model draws. At the
        weights that drew a picture little of its loss is left, and the sign of that rest is close to chance; the output
        itself is not small there.

    Source of output_norm: Zheng et al., "Intriguing properties of data attribution on diffusion models" (2024), who
    differentiate other functions of a diffusion model's output in place of its loss.
    """

    loss = "loss"
    output_norm = "output_norm"
