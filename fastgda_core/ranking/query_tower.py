"""The query tower: the gradient of a query that the model is not run on, from its caption's tokens and its features.

In a layer that sees the caption alone the gradient is a sum over the caption's tokens of (output gradient, summed over
noise) x (input). The inputs are known as soon as the caption is, and they are most of what tells gradients apart. The
output gradients are learned: a ridge regression, token by token, on [the token's input, its place, the caption's mean
input, the features phi of image and caption]. Every training sample is a query whose output gradients are known, so no
query need be generated and no teacher asked.

What is wanted of the gradient is its sketch, so that all that follows the regression is folded into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.errors import UsageError
from fastgda_core.ranking.folding import ENERGY, FoldedLayers, fold
from fastgda_core.sketches.principal import PrincipalSketch
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

    def solve(self, ridge: float) -> dict[str, Tensor]:
        """Solve (X^T X + ridge I) W = X^T Y for every layer: (p, d_out) float64."""
        weights: dict[str, Tensor] = {}
        for first, mine in self._together.items():
            products = torch.cat([self.products[name] for name in mine], dim=1)
            solved = torch.cholesky_solve(products, torch.linalg.cholesky(self._damped(first, ridge)))
            widths = [self.products[name].shape[1] for name in mine]
            weights |= dict(zip(mine, solved.split(widths, dim=1), strict=True))
        return weights

    def tower(self, ridge: float, sketch: PrincipalSketch, size: int, energy: float = ENERGY) -> QueryTower:
        """Return what predicts the first `size` numbers of a query's sketch; `energy` as of `fold`."""
        solved = self.solve(ridge)
        return QueryTower(
            {
                first: fold(self._damped(first, ridge), {name: solved[name] for name in mine}, sketch, size, energy)
                for first, mine in self._together.items()
            }
        )

    @property
    def _together(self) -> dict[str, list[str]]:
        """The layers that see the same inputs, by the first of them."""
        return {first: [name for name, seen in self.seen_by.items() if seen == first] for first in self.squares}

    def _damped(self, first: str, ridge: float) -> Tensor:
        squares = self.squares[first]
        return squares + ridge * torch.eye(len(squares), dtype=squares.dtype, device=squares.device)


@dataclass(frozen=True)
class QueryTower:
    """layers: what predicts a sketch, by the first of the layers that see the same inputs."""

    layers: Mapping[str, FoldedLayers]

    def sketches(self, inputs: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Return the sketches of queries' gradients, (queries, R), in the scale of samples' losses.

        Args:
            inputs: (queries, tokens, d_in) by layer, as of `caption_inputs`.
            features: phi of the queries, (queries, d), of unit length.
        """
        parts = [layers.sketches(_rows(inputs[name], features), inputs[name]) for name, layers in self.layers.items()]
        return torch.stack(parts).sum(0)

    @property
    def size(self) -> int:
        """R, the numbers of a sketch."""
        return len(next(iter(self.layers.values())).directions)


@dataclass(frozen=True)
class GradientHead:
    """What answers from vectors of samples that are exact, and of queries that the tower predicts.

    A sample's vector is its sketch beside its features' principal axes, a query's the predicted sketch of its gradient,
    at length 1, beside its own, times `cosine`.

    tower: predicts sketches.
    axes: (d, a) principal axes of the samples' features at length 1.
    cosine: weight of the features' inner product.
    """

    tower: QueryTower
    axes: Tensor
    cosine: float

    def queries(self, sketches: Tensor, features: Tensor) -> Tensor:
        """Return the vectors of queries, (q, R + a), from predicted sketches, (q, R), and features, (q, d)."""
        predicted = F.normalize(sketches, dim=1)
        return torch.cat([predicted, self.cosine * (F.normalize(features, dim=1) @ self.axes)], dim=1)

    def samples(self, sketches: Tensor, features: Tensor) -> Tensor:
        """Return the vectors of samples, (n, R + a), from R or more numbers of their sketches and features, (n, d)."""
        return torch.cat([sketches[:, : self.tower.size], F.normalize(features, dim=1) @ self.axes], dim=1)

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load` reads; directions in half precision."""
        tensors = {"axes": self.axes}
        for first, layers in self.tower.layers.items():
            parts = {**vars(layers), "directions": layers.directions.half()}
            tensors |= {f"{part}/{first}": tensor for part, tensor in parts.items()}
        record = json.dumps({"cosine": self.cosine, "inputs": list(self.tower.layers)})
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, {"head": record})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Read a file that `save` wrote.

        Raises:
            UsageError: the file holds no such head.
        """
        with safe_open(path, "pt", device=str(device)) as file:
            record = json.loads((file.metadata() or {}).get("head", "{}"))
            if "inputs" not in record:
                raise UsageError(f"{path} is no head of kind gradient, or one of before it was folded: train it again")
            layers = {
                first: FoldedLayers(
                    **{part.name: file.get_tensor(f"{part.name}/{first}") for part in fields(FoldedLayers)}
                )
                for first in record["inputs"]
            }
            axes = file.get_tensor("axes")
        whole = {first: replace(each, directions=each.directions.float()) for first, each in layers.items()}
        return cls(QueryTower(whole), axes, record["cosine"])


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
