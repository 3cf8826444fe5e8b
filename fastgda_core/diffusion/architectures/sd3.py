"""Stable Diffusion 3 and 3.5 (Esser et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.diffusion.architectures.architecture import Architecture, CaptionParts
from fastgda_core.diffusion.captions import CaptionEncoder, TextEncoder

SD3_T5_TOKENS = 256


@dataclass(frozen=True)
class StableDiffusion3Captions:
    """SD3: two CLIP encoders side by side, padded and followed by T5's tokens (zeros where the model has no T5)."""

    clips: list[TextEncoder]
    t5: TextEncoder | None
    width: int

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, pooled = zip(*(encoder.penultimate_and_pooled(captions) for encoder in self.clips), strict=True)
        clip = torch.cat(hidden, dim=-1)
        clip = torch.nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if self.t5 is None:
            t5 = clip.new_zeros(len(captions), SD3_T5_TOKENS, self.width)
        else:
            t5 = self.t5.encoder(self.t5.tokens(captions, SD3_T5_TOKENS).input_ids)[0]
        return {"encoder_hidden_states": torch.cat([clip, t5], dim=1), "pooled_projections": torch.cat(pooled, dim=-1)}

    def said(self, captions: list[str]) -> Tensor:
        clip = self.clips[0].said(captions)
        t5 = self.t5.said(captions, SD3_T5_TOKENS) if self.t5 else clip.new_zeros(len(captions), SD3_T5_TOKENS)
        return torch.cat([clip, t5], dim=1)


def _captions(parts: CaptionParts) -> CaptionEncoder:
    clips = [parts.encoders["text_encoder"], parts.encoders["text_encoder_2"]]
    width = parts.denoiser.config.joint_attention_dim
    return StableDiffusion3Captions(clips, parts.encoders.get("text_encoder_3"), width)


ARCHITECTURE = Architecture("SD3Transformer2DModel", "transformer", "cross-attn-kv", _captions)
