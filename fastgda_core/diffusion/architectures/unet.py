"""Stable Diffusion 1, 2 and XL (Rombach et al., 2022; Podell et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.diffusion.architectures.architecture import Architecture, CaptionParts
from fastgda_core.diffusion.captions import CaptionEncoder, TextEncoder


@dataclass(frozen=True)
class StableDiffusionCaptions:
    """Stable Diffusion 1 and 2: the text encoder's last hidden state."""

    text: TextEncoder

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.text.last_hidden(captions)}

    def said(self, captions: list[str]) -> Tensor:
        return self.text.said(captions)


@dataclass(frozen=True)
class StableDiffusionXLCaptions:
    """SDXL: two text encoders side by side, the second's pooled output, and the size of an uncropped image."""

    encoders: list[TextEncoder]
    resolution: tuple[int, int]
    zeros_for_empty: bool

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, pooled = zip(*(encoder.penultimate_and_pooled(captions) for encoder in self.encoders), strict=True)
        text, text_embeds = torch.cat(hidden, dim=-1), pooled[-1]
        if self.zeros_for_empty:
            said = torch.tensor([bool(caption) for caption in captions], device=text.device)
            text, text_embeds = text * said[:, None, None], text_embeds * said[:, None]
        time_ids = text_embeds.new_tensor([*self.resolution, 0, 0, *self.resolution]).expand(len(captions), 6)
        return {
            "encoder_hidden_states": text,
            "added_cond_kwargs.text_embeds": text_embeds,
            "added_cond_kwargs.time_ids": time_ids,
        }

    def said(self, captions: list[str]) -> Tensor:
        return self.encoders[0].said(captions)


def _captions(parts: CaptionParts) -> CaptionEncoder:
    if parts.denoiser.config.addition_embed_type == "text_time":
        both = [parts.encoders["text_encoder"], parts.encoders["text_encoder_2"]]
        return StableDiffusionXLCaptions(both, parts.resolution, parts.zeros_for_empty_caption)
    return StableDiffusionCaptions(parts.encoders["text_encoder"])


ARCHITECTURE = Architecture("UNet2DConditionModel", "unet", "cross-attn-kv", _captions)
