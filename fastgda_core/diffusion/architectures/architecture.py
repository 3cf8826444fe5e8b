"""The facts of an architecture: one object for each class of denoiser, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgda_core.diffusion.captions import CaptionEncoder, TextEncoder


@dataclass(frozen=True)
class CaptionParts:
    """What a caption encoder is made of.

    denoiser: loaded, on the device. encoders: by folder, as `text_encoder_2`. resolution: height and width in pixels.
    pipeline, labels, zeros_for_empty_caption: as `folder.ModelIndex` has them.
    """

    denoiser: Any
    encoders: Mapping[str, TextEncoder]
    resolution: tuple[int, int]
    pipeline: str
    labels: Mapping[str, str]
    zeros_for_empty_caption: bool

    @property
    def device(self) -> torch.device:
        return self.denoiser.device


@dataclass(frozen=True)
class Architecture:
    """A class of denoisers, and how its pipeline uses it.

    denoiser: the class in diffusers. part: its folder, `unet` or `transformer`. layers: those whose weights an
    unlearning step moves where nobody chooses. captions: makes the encoder from captions to the denoiser's keyword
    arguments. denoiser_class: gives a class to load instead, whose forward takes latents (n, c, h, w) and a timestep as
    the scheduler has it, where that of diffusers takes others. encodes_text: it has text encoders. sample_size: of its
    latents, where the denoiser's config names none. squares: its latents are as high as wide, whatever is asked for.
    """

    denoiser: str
    part: str
    layers: str
    captions: Callable[[CaptionParts], CaptionEncoder]
    denoiser_class: Callable[[], Any] | None = None
    encodes_text: bool = True
    sample_size: int | None = None
    squares: bool = False

    def load_class(self) -> Any:
        """Return the class whose `from_pretrained` loads the denoiser."""
        import diffusers

        return getattr(diffusers, self.denoiser) if self.denoiser_class is None else self.denoiser_class()
