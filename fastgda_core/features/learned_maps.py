"""Linear maps of an encoder's output that were learned for attribution, one for training images, one for queries.

Source: Wang et al., "Evaluating data attribution for text-to-image models" (ICCV 2023, arXiv 2306.09345), "AbC", and
its code, PeterWang512/GenDataAttribution, whose `weights/mapper/clip_tuned.pth` and `dino_tuned.pth` are read here.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.features.encoder import Encoder

SAFE = "mapper.safetensors"  # the same tensors, as real_mapper.weight and so on
SIDES = ("real_mapper", "synth_mapper")  # of training images, of generated ones


@dataclass(frozen=True)
class LinearMap:
    """phi becomes phi weight^T + bias: weight (d_out, d_in), bias (d_out,), float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return (n, d_out) of features (n, d_in)."""
        return F.linear(features, self.weight, self.bias)


def read_maps(folder: Path, published: str) -> tuple[LinearMap, LinearMap]:
    """Read the maps of training images and of queries from a folder.

    Args:
        folder: has `mapper.safetensors`, or the file as published.
        published: name of that file.

    Raises:
        ValueError: there is no such file, or it holds anything but two linear maps. No code in it is run.
    """
    safe, pickled = folder / SAFE, folder / published
    if safe.is_file():
        return _maps({name: _of_side(load_file(safe), name) for name in SIDES}, safe.name)
    if not pickled.is_file():
        raise ValueError(f"it has neither {published} nor {SAFE}")
    try:
        return _maps(torch.load(pickled, map_location="cpu", weights_only=True), published)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{published} is no file of tensors alone") from error


def mapped(encoder: Encoder, maps: tuple[LinearMap, LinearMap], name: str) -> Encoder:
    """Return an image encoder whose outputs go through the map of training images, those of queries through the other.

    Raises:
        ValueError: the maps are of features of another width.
    """
    of_samples, of_queries = maps
    width = encoder.encode([Image.new("RGB", (64, 64))]).shape[1]
    if of_samples.weight.shape[1] != width:
        raise ValueError(f"its maps take {of_samples.weight.shape[1]} features, {name} has {width}")
    of_prepared = encoder.of_prepared
    return Encoder(
        encoder.modality,
        lambda images: of_samples(encoder.encode(images)),
        lambda images: of_queries(encoder.encode(images)),
        encoder.prepare,
        None if of_prepared is None else lambda ready: of_samples(of_prepared(ready)),
    )


def _of_side(tensors: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    start = f"{side}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _maps(content: Any, file: str) -> tuple[LinearMap, LinearMap]:
    several = [content.get(side) if isinstance(content, Mapping) else None for side in SIDES]
    found = []
    for side, state in zip(SIDES, several, strict=True):
        if not isinstance(state, Mapping) or sorted(state) != ["bias", "weight"]:
            raise ValueError(f"{file} lacks a weight and a bias alone of {side}")
        weight, bias = state["weight"], state["bias"]
        if not all(isinstance(each, Tensor) and each.is_floating_point() for each in (weight, bias)):
            raise ValueError(f"{file}: {side} is not of numbers")
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{file}: {side} has shapes {tuple(weight.shape)} and {tuple(bias.shape)}, no linear map's"
            )
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"{file}: {side} has numbers that are not finite")
        found.append(LinearMap(weight.float(), bias.float()))
    of_samples, of_queries = found
    if of_samples.weight.shape != of_queries.weight.shape:
        raise ValueError(f"{file}: the two maps are of different shapes")
    return of_samples, of_queries
