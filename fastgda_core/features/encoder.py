"""What every encoder is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: `encode` maps a batch of RGB images or of captions to (n, dim) float32."""

    modality: Literal["image", "text"]
    encode: Callable[[list[Any]], Tensor]
