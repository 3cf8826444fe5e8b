"""The rank head g_psi: an MLP over frozen features whose cosine orders training samples as the teacher does."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastgda_core.errors import UsageError

WIDTH = 768
HIDDEN_LAYERS = 3
DROPOUT = 0.1
AXES_FROM = 100_000  # rows of which principal axes are taken


class MLP(nn.Module):
    """Hidden layers with ReLU and dropout, optionally behind a LayerNorm; weights named as in FastGDA's release."""

    def __init__(self, features: int, hidden: list[int], outputs: int, *, input_norm: bool) -> None:
        super().__init__()
        widths = [features, *hidden]
        self.input_norm = nn.LayerNorm(features) if input_norm else nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.output_layer = nn.Linear(widths[-1], outputs)
        self.dropout = nn.Dropout(DROPOUT)
        for layer in (*self.layers, self.output_layer):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        features = self.input_norm(features)
        for layer in self.layers:
            features = self.dropout(F.relu(layer(features)))
        return self.output_layer(features)


class RankHead(nn.Module):
    """f_psi(z) = g_psi(phi(z)), by default 3 hidden layers of 768, and affine maps from the cosine to what is learned.

    Args:
        features: d of phi.
        input_norm: whether a LayerNorm comes first.
        outputs: number of affine maps of the cosine; 1 but for the ordinal loss.
        scale: initial scale of these maps; negative, as a high cosine is to mean a low rank label.
        hidden, width: widths of the hidden layers and of the output.
    """

    def __init__(
        self,
        features: int,
        *,
        input_norm: bool = False,
        outputs: int = 1,
        scale: float = -5.0,
        hidden: tuple[int, ...] = (WIDTH,) * HIDDEN_LAYERS,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.features = features
        self.mlp = MLP(features, list(hidden), width, input_norm=input_norm)
        self.scale = nn.Parameter(torch.full((outputs,), scale))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Map features, (n, features), to unit vectors, (n, width)."""
        return F.normalize(self.mlp(features), dim=1)

    def queries(self, features: Tensor) -> Tensor:
        """Map queries, (n, features), to unit vectors, (n, width), whose cosine with a sample grows with its influence.

        These are the vectors of `forward`, negated where the scale is positive: there a high cosine means a high label.
        """
        return -self(features) if bool((self.scale > 0).all()) else self(features)

    def affine(self, cosine: Tensor) -> Tensor:
        """Return scale * cos + bias, (...) to (..., outputs)."""
        return cosine[..., None] * self.scale + self.bias


@torch.no_grad()
def start_from_features(head: RankHead, features: Tensor) -> None:
    """Set the weights so that the head's cosines are those of centred features; training then departs from there.

    "Looks-linear" initialisation (Balduzzi et al., "The shattered gradients problem", 2017): with hidden units in pairs
    (u, -u) a ReLU network is linear, here the projection on the first 384 principal axes of `features`, (n, d).
    With few queries a head that starts at random loses what the features know before it learns what the teacher knows.
    """
    mlp = head.mlp
    first, *hidden = (layer for layer in mlp.layers if isinstance(layer, nn.Linear))
    half = WIDTH // 2
    known = mlp.input_norm(features[:: max(1, len(features) // AXES_FROM)])
    mean = known.mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov(known.T))
    axes = vectors[:, variance > 1e-6 * variance[-1]].T.flip(0)[:half]
    rows = len(axes)
    first.weight[:rows] = axes  # where there are fewer axes than pairs, the other pairs keep their random weights
    first.bias[:rows] = -axes @ mean
    first.weight[half:], first.bias[half:] = -first.weight[:half], -first.bias[:half]
    for layer in hidden:
        nn.init.eye_(layer.weight)
    last = mlp.output_layer
    nn.init.zeros_(last.weight)
    last.weight[:rows, :rows] = torch.eye(rows)
    last.weight[:rows, half : half + rows] = -torch.eye(rows)


def head_of_weights(weights: dict[str, Tensor], source: Path) -> RankHead:
    """Build a head from `mlp.layers.N.weight`, `mlp.output_layer.weight`, `scale`, `bias`, of the tensors' dimensions.

    Raises:
        UsageError: the tensors are not those of a rank head.
    """
    layers = sorted(int(found[1]) for name in weights if (found := re.fullmatch(r"mlp\.layers\.(\d+)\.weight", name)))
    if not layers or "mlp.output_layer.weight" not in weights or "scale" not in weights:
        raise UsageError(
            f"{source} is no rank head: mlp.layers.N.weight, mlp.output_layer.weight, scale and bias are expected"
        )
    hidden = tuple(len(weights[f"mlp.layers.{number}.weight"]) for number in layers)
    head = RankHead(
        weights[f"mlp.layers.{layers[0]}.weight"].shape[1],
        input_norm="mlp.input_norm.weight" in weights,
        outputs=weights["scale"].numel(),
        hidden=hidden,
        width=len(weights["mlp.output_layer.weight"]),
    )
    try:
        head.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise UsageError(f"{source} is no rank head: {' '.join(str(error).split())}") from error
    return head.eval().requires_grad_(False)


def save_head(head: RankHead, path: Path) -> None:
    """Write the head's weights as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, path)


def load_head(folder: Path) -> RankHead:
    """Load `head.safetensors`, in eval mode; `head.json` must agree on the dimension of its features.

    Raises:
        UsageError: the two files disagree, or the weights are not those of a rank head.
    """
    head = head_of_weights(load_file(folder / "head.safetensors"), folder / "head.safetensors")
    declared = json.loads((folder / "head.json").read_text())["features"]
    if declared != head.features:
        raise UsageError(f"{folder}: head.json says {declared} features, the weights take {head.features}")
    return head


def load_release_checkpoint(path: Path) -> RankHead:
    """Read a rank head in the layout of FastGDA's release (a pickled `state_dict`), without running its code.

    Source: github.com/PeterWang512/FastGDA, fastgda/models.py (DualMLPModel).

    Raises:
        UsageError: the file cannot be read as plain tensors, holds something else, or its scale has no common sign.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for damaged and for unsafe files
        raise UsageError(f"{path} is no checkpoint of plain tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UsageError(f"{path} is no state_dict: tensors by name are expected")
    head = head_of_weights(weights, path)
    if not ((head.scale < 0).all() or (head.scale > 0).all()):
        raise UsageError(
            f"{path}: its scale is {head.scale.tolist()}, so that a cosine does not say which sample has more influence"
        )
    return head
