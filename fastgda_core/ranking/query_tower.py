"""The query tower: the gradient of a query that the model is not run on, from its caption's tokens and its features.

In a layer that sees the caption alone the gradient is a sum over the caption's tokens of (output gradient, summed over
noise) x (input). The inputs are known as soon as the caption is, and they are most of what tells gradients apart. The
output gradients are learned: a ridge regression, token by token, on [the token's input, its place, the caption's mean
input, the features phi of image and caption]. Every training sample is a query whose output gradients are known, so no
query need be generated and no teacher asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.teachers.gradients import weight_gradient
from fastgda_core.teachers.sample_gradients import SampleGradients


@dataclass(eq=False)
class TowerMoments:
    """Sums over tokens of training samples, from which towers of any ridge are solved.

    squares: X^T X by first layer that sees an input, (p, p) float64; products: X^T Y by layer, (p, d_out) float64.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    products: dict[str, Tensor] = field(default_factory=dict)
    seen_by: dict[str, str] = field(default_factory=dict)

    def add(self, gradients: SampleGradients, features: Tensor) -> None:
        """Add the tokens of some samples, each of their captions as a query of its own; mirrored images do not count.

        Args:
            gradients: under noise of their own, not under that of the sketches that are ranked.
            features: phi of the samples, (n, d), of unit length.

        Raises:
            UsageError: the input of a layer moves with the timestep.
        """
        if gradients.moving:
            raise UsageError(
                f"the input of layer {min(gradients.moving)} changes with the timestep, so the gradient of a query is "
                "more than its caption's tokens tell: use head.kind symmetric, or teacher.layers cross-attn-kv"
            )
        sample = gradients.place[:: gradients.flips] // gradients.flips
        captions = torch.bincount(sample, minlength=len(features))[sample]
        rows = {name: _rows(inputs, features[sample]) for name, inputs in gradients.inputs.items()}
        for name, found in rows.items():
            self.squares[name] = self.squares.get(name, 0) + (found.T @ found).double()
        for name, outputs in gradients.outputs.items():
            self.seen_by[name] = gradients.seen_by[name]
            # A caption's share in its sample is one of them all.
            whole = outputs[:: gradients.flips].float() * captions[:, None, None]
            product = rows[self.seen_by[name]].T @ whole.flatten(0, 1)
            self.products[name] = self.products.get(name, 0) + product.double()

    def tower(self, ridge: float) -> QueryTower:
        """Solve (X^T X + ridge I) W = X^T Y for every layer."""
        weights: dict[str, Tensor] = {}
        for first, squares in self.squares.items():
            mine = [name for name, seen in self.seen_by.items() if seen == first]
            damped = squares + ridge * torch.eye(len(squares), dtype=squares.dtype, device=squares.device)
            solved = torch.linalg.solve(damped, torch.cat([self.products[name] for name in mine], dim=1))
            parts = solved.float().split([self.products[name].shape[1] for name in mine], dim=1)
            weights |= dict(zip(mine, parts, strict=True))
        return QueryTower(weights, dict(self.seen_by))


@dataclass(frozen=True)
class QueryTower:
    """weights: (p, d_out) by layer; seen_by: by layer, the layer whose inputs are its inputs."""

    weights: Mapping[str, Tensor]
    seen_by: Mapping[str, str]

    def gradients(self, inputs: Mapping[str, Tensor], features: Tensor) -> dict[str, Tensor]:
        """Return the gradients of queries, by layer, (queries, d_out, d_in), in the scale of samples' losses.

        Args:
            inputs: (queries, tokens, d_in) by layer, as of `caption_inputs`.
            features: phi of the queries, (queries, d), of unit length.
        """
        rows = {name: _rows(inputs[name], features) for name in set(self.seen_by.values())}
        found = {}
        for name, weight in self.weights.items():
            seen = inputs[self.seen_by[name]]
            outputs = (rows[self.seen_by[name]] @ weight).view(*seen.shape[:2], -1)
            found[name] = weight_gradient(outputs, seen)
        return found


def _rows(inputs: Tensor, features: Tensor) -> Tensor:
    """Return what the output gradient of each token is predicted from, (captions * tokens, p) float32."""
    captions, tokens, _ = inputs.shape
    inputs = inputs.float()
    place = torch.eye(tokens, device=inputs.device).expand(captions, tokens, tokens)
    whole = torch.cat([inputs.mean(1), features.float(), features.new_ones(captions, 1).float()], dim=1)
    return torch.cat([inputs, place, whole[:, None].expand(captions, tokens, -1)], dim=2).flatten(0, 1)
