"""The query tower: the gradient of a query that the model is not run on, from its caption's tokens and its features.

In a layer that sees the caption alone the gradient is a sum over the caption's tokens of (output gradient, summed over
noise) x (input). The inputs are known as soon as the caption is, and they are most of what tells gradients apart. The
output gradients are learned: a ridge regression, token by token, on [the token's input, its place, the caption's mean
input, the features phi of image and caption]. Every training sample is a query whose output gradients are known, so no
query need be generated and no teacher asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

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
        gradients.check_steady(
            "so the gradient of a query is more than its caption's tokens tell: use head.kind symmetric, or "
            "teacher.layers cross-attn-kv"
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


@dataclass(frozen=True)
class GradientHead:
    """What answers from vectors of samples that are exact, and of queries that the tower predicts.

    A sample's vector is its sketch beside its features' principal axes, a query's the predicted sketch of its gradient,
    at length 1, beside its own, times `cosine`.

    tower: the regression.
    axes: (d, a) principal axes of the samples' features at length 1.
    cosine: weight of the features' inner product.
    size: numbers of a sketch that count.
    """

    tower: QueryTower
    axes: Tensor
    cosine: float
    size: int

    def queries(self, sketches: Tensor, features: Tensor) -> Tensor:
        """Return the vectors of queries, (q, size + a), from predicted sketches, (q, R), and features, (q, d)."""
        predicted = F.normalize(sketches[:, : self.size], dim=1)
        return torch.cat([predicted, self.cosine * (F.normalize(features, dim=1) @ self.axes)], dim=1)

    def samples(self, sketches: Tensor, features: Tensor) -> Tensor:
        """Return the vectors of samples, (n, size + a), from their sketches, (n, R), and features, (n, d)."""
        return torch.cat([sketches[:, : self.size], F.normalize(features, dim=1) @ self.axes], dim=1)

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load` reads."""
        tensors = {"axes": self.axes, **{f"weight/{name}": weight for name, weight in self.tower.weights.items()}}
        record = json.dumps({"seen_by": dict(self.tower.seen_by), "cosine": self.cosine, "size": self.size})
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, {"head": record})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Read a file that `save` wrote.

        Raises:
            UsageError: the file holds no such head.
        """
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if "head" not in metadata:
                raise UsageError(f"{path} is no head of kind gradient: train it again")
            record = json.loads(metadata["head"])
            weights = {name: file.get_tensor(f"weight/{name}") for name in record["seen_by"]}
            axes = file.get_tensor("axes")
        return cls(QueryTower(weights, record["seen_by"]), axes, record["cosine"], record["size"])


def principal_axes(features: Tensor, most: int) -> Tensor:
    """Return the first principal axes of features, (n, d) of length 1, without taking their mean off: (d, axes)."""
    _, vectors = torch.linalg.eigh((features.T @ features).double())
    return vectors.flip(1)[:, :most].float()


def _rows(inputs: Tensor, features: Tensor) -> Tensor:
    """Return what the output gradient of each token is predicted from, (captions * tokens, p) float32."""
    captions, tokens, _ = inputs.shape
    inputs = inputs.float()
    place = torch.eye(tokens, device=inputs.device).expand(captions, tokens, tokens)
    whole = torch.cat([inputs.mean(1), features.float(), features.new_ones(captions, 1).float()], dim=1)
    return torch.cat([inputs, place, whole[:, None].expand(captions, tokens, -1)], dim=2).flatten(0, 1)
