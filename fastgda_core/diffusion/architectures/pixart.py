"""PixArt-alpha and -sigma (Chen et al., 2023, 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastgda_core.diffusion.architectures.architecture import Architecture, CaptionParts
from fastgda_core.diffusion.captions import CaptionEncoder, TextEncoder

PIXART_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


@dataclass(frozen=True)
class PixArtCaptions:
    """PixArt: T5 over the lower-case caption, padding hidden; large models are also told the image's size."""

    text: TextEncoder
    tokens: int
    resolution: tuple[int, int] | None

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        tokens = self.text.tokens([caption.lower().strip() for caption in captions], self.tokens)
        hidden = self.text.encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        condition = {"encoder_hidden_states": hidden, "encoder_attention_mask": tokens.attention_mask}
        if self.resolution is not None:
            count, (height, width) = len(captions), self.resolution
            condition["added_cond_kwargs.resolution"] = hidden.new_tensor([height, width]).repeat(count, 1)
            condition["added_cond_kwargs.aspect_ratio"] = hidden.new_full((count, 1), height / width)
        return condition

    def said(self, captions: list[str]) -> Tensor:
        return self(captions)["encoder_attention_mask"].bool()


def _captions(parts: CaptionParts) -> CaptionEncoder:
    tokens = PIXART_TOKENS.get(parts.pipeline, PIXART_TOKENS["PixArtAlphaPipeline"])
    told = parts.resolution if parts.denoiser.use_additional_conditions else None
    return PixArtCaptions(parts.encoders["text_encoder"], tokens, told)


ARCHITECTURE = Architecture("PixArtTransformer2DModel", "transformer", "cross-attn-kv", _captions)
