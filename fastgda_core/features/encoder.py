"""What every encoder is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from PIL import Image
from torch import Tensor

Ready = TypeVar("Ready")


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: `encode` maps a batch of RGB images or of captions to (n, dim) float32.

    of_queries: the same of queries, where it was learned that they and training samples want different maps.
    prepare, of_prepared: the two halves of `encode`, where an image can be made ready by itself, by any thread, before
        its batch is there: what is kept of it, which is smaller, and the features of a batch of that.
    """

    modality: Literal["image", "text"]
    encode: Callable[[list[Any]], Tensor]
    of_queries: Callable[[list[Any]], Tensor] | None = None
    prepare: Callable[[Any], Any] | None = None
    of_prepared: Callable[[list[Any]], Tensor] | None = None

    @classmethod
    def of_images(
        cls, prepare: Callable[[Image.Image], Ready], of_prepared: Callable[[list[Ready]], Tensor]
    ) -> Encoder:
        """Return an image encoder of its two halves."""
        return cls(
            "image",
            lambda images: of_prepared([prepare(image) for image in images]),
            prepare=prepare,
            of_prepared=of_prepared,
        )

    def encode_queries(self, items: list[Any]) -> Tensor:
        """Return the features of queries, (n, dim) float32, to be compared with `encode` of training samples."""
        return (self.of_queries or self.encode)(items)
