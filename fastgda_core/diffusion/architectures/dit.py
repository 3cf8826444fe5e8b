"""DiT: captions are classes (Peebles & Xie, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.diffusion.architectures.architecture import Architecture, CaptionParts
from fastgda_core.diffusion.captions import CaptionEncoder
from fastgda_core.errors import UsageError


@dataclass(frozen=True)
class ClassLabels:
    """DiT: a caption is the name of a class; the empty caption is the class that stands for none."""

    numbers: dict[str, int]
    none: int
    device: torch.device

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        if unknown := [caption for caption in captions if caption and caption not in self.numbers]:
            raise UsageError(
                f"caption {unknown[0]!r} is no class of this model: give a name from id2label in model_index.json"
            )
        rows = [self.numbers[caption] if caption else self.none for caption in captions]
        return {"class_labels": torch.tensor(rows, device=self.device)}


def _captions(parts: CaptionParts) -> CaptionEncoder:
    numbers = {name.strip(): int(number) for number, names in parts.labels.items() for name in names.split(",")}
    return ClassLabels(numbers, parts.denoiser.config.num_embeds_ada_norm, parts.device)


# It has no layer for the caption alone, and puts its patches together as a square.
ARCHITECTURE = Architecture("DiTTransformer2DModel", "transformer", "attn", _captions, encodes_text=False, squares=True)
