"""The rank head g_psi: an MLP over frozen features whose cosine orders training samples as the teacher does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 768
HIDDEN_LAYERS = 3
DROPOUT = 0.1


class RankHead(nn.Module):
    """f_psi(z) = g_psi(phi(z)), 3 hidden layers of 768, and an affine map from cosine to rank label."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        layers: list[nn.Module] = []
        width = features
        for _ in range(HIDDEN_LAYERS):
            layers += [nn.Linear(width, WIDTH), nn.ReLU(), nn.Dropout(DROPOUT)]
            width = WIDTH
        self.mlp = nn.Sequential(*layers, nn.Linear(width, WIDTH))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        # A high cosine means a low rank label, so the scale starts, and stays, negative.
        self.scale = nn.Parameter(torch.tensor(-5.0))
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, features: Tensor) -> Tensor:
        """(n, features) to unit vectors, (n, 768)."""
        return F.normalize(self.mlp(features), dim=1)

    def rank_logits(self, query: Tensor, sample: Tensor) -> Tensor:
        """Logits of the rank label of pairs of unit vectors, (..., 768) each."""
        return self.scale * (query * sample).sum(-1) + self.bias


@torch.no_grad()
def start_from_features(head: RankHead, features: Tensor) -> None:
    """Set the weights so that the head's cosines are those of centred features; training then departs from there.

    "Looks-linear" initialisation (Balduzzi et al., "The shattered gradients problem", 2017): with hidden units in pairs
    (u, -u) a ReLU network is linear, here the projection on the first 384 principal axes of `features`, (n, d).
    With few queries a head that starts at random loses what the features know before it learns what the teacher knows.
    """
    first, *hidden, last = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    half = WIDTH // 2
    mean = features.mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov(features.T))
    axes = vectors[:, variance > 1e-6 * variance[-1]].T.flip(0)[:half]
    rows = len(axes)
    first.weight[:rows] = axes  # where there are fewer axes than pairs, the other pairs keep their random weights
    first.bias[:rows] = -axes @ mean
    first.weight[half:], first.bias[half:] = -first.weight[:half], -first.bias[:half]
    for layer in hidden:
        nn.init.eye_(layer.weight)
    nn.init.zeros_(last.weight)
    last.weight[:rows, :rows] = torch.eye(rows)
    last.weight[:rows, half : half + rows] = -torch.eye(rows)


def save_head(head: RankHead, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, path)


def load_head(folder: Path) -> RankHead:
    """Load `head.safetensors` with the dimensions in `head.json`, in eval mode."""
    head = RankHead(json.loads((folder / "head.json").read_text())["features"])
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head.eval().requires_grad_(False)
