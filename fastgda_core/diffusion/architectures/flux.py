"""FLUX.1: a flow over packed latents (Black Forest Labs, 2024)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgda_core.diffusion.architectures.architecture import Architecture, CaptionParts
from fastgda_core.diffusion.captions import CaptionEncoder, TextEncoder

FLUX_T5_TOKENS = 512
GUIDANCE = 3.5  # told to models that were distilled from guidance: the default of their pipeline and of its trainings
TOLD_TIMESTEPS = 1000  # the pipeline tells the timestep as a share of these


@dataclass(frozen=True)
class FluxCaptions:
    """T5's tokens, padding among them, and CLIP's pooled output; distilled models are also told a guidance."""

    clip: TextEncoder
    t5: TextEncoder
    guidance: float | None

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        hidden = self.t5.encoder(self.t5.tokens(captions, FLUX_T5_TOKENS).input_ids)[0]
        pooled = self.clip.encoder(self.clip.tokens(captions).input_ids).pooler_output
        told = {} if self.guidance is None else {"guidance": pooled.new_full((len(captions),), self.guidance)}
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled, **told}

    def said(self, captions: list[str]) -> Tensor:
        return self.t5.said(captions, FLUX_T5_TOKENS)


def pack(latents: Tensor) -> Tensor:
    """Return blocks of 2 x 2 positions as tokens, (n, h w / 4, 4 c), of latents (n, c, h, w)."""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the latents, (n, c, height, width), that `pack` made tokens of."""
    n, c = len(tokens), tokens.shape[-1] // 4
    blocks = tokens.reshape(n, height // 2, width // 2, c, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(n, c, height, width)


def _denoiser_class() -> Any:
    import diffusers

    class FluxTransformer2DModel(diffusers.FluxTransformer2DModel):
        """The denoiser of diffusers, over latents as they are; its name and its weights stay those of diffusers."""

        @property
        def latent_channels(self) -> int:
            return self.config.in_channels // 4

        def forward(
            self,
            latents: Tensor,
            timestep: Tensor,
            encoder_hidden_states: Tensor,
            pooled_projections: Tensor,
            guidance: Tensor | None = None,
            return_dict: bool = False,
        ) -> tuple[Tensor]:
            height, width = latents.shape[2:]
            image = latents.new_zeros(height // 2, width // 2, 3)
            image[..., 1] += torch.arange(height // 2, device=latents.device)[:, None]
            image[..., 2] += torch.arange(width // 2, device=latents.device)
            (predicted,) = super().forward(
                pack(latents),
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=(timestep / TOLD_TIMESTEPS).to(latents.dtype),
                guidance=guidance,
                img_ids=image.reshape(-1, 3),
                txt_ids=latents.new_zeros(encoder_hidden_states.shape[1], 3),
                return_dict=False,
            )
            return (unpack(predicted, height, width),)

    return FluxTransformer2DModel


def _captions(parts: CaptionParts) -> CaptionEncoder:
    guidance = GUIDANCE if parts.denoiser.config.guidance_embeds else None
    return FluxCaptions(parts.encoders["text_encoder"], parts.encoders["text_encoder_2"], guidance)


ARCHITECTURE = Architecture(
    "FluxTransformer2DModel",
    "transformer",
    "cross-attn-kv",
    _captions,
    denoiser_class=functools.cache(_denoiser_class),
    sample_size=128,  # the pipeline's default: 1,024 pixels
)
