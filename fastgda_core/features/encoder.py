"""What every encoder is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: `encode` maps a batch of RGB images or of captions to (n, dim) float32.

    of_queries: the same of queries, where it was learned that they and training samples want different maps.
    """

    modality: Literal["image", "text"]
    encode: Callable[[list[Any]], Tensor]
    of_queries: Callable[[list[Any]], Tensor] | None = None

    def encode_queries(self, items: list[Any]) -> Tensor:
        """Return the features of queries, (n, dim) float32, to be compared with `encode` of training samples."""
        return (self.of_queries or self.encode)(items)
