"""Sana: linear attention over deeply compressed latents, captions through Gemma (Xie et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.diffusion.architectures.architecture import Architecture, CaptionParts
from fastgda_core.diffusion.captions import CaptionEncoder, TextEncoder
from fastgda_core.errors import UsageError

SANA_TOKENS = 300


@dataclass(frozen=True)
class SanaCaptions:
    """Gemma over the lower-case caption behind the pipeline's instruction: its first token and the last 299.

    The empty caption stands alone, as the pipeline's negative prompt does.
    """

    text: TextEncoder
    instruction: str

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        for empty in (True, False):
            if numbers := [number for number, caption in enumerate(captions) if (not caption) == empty]:
                hidden, mask = self._encoded(
                    [captions[number] for number in numbers], "" if empty else self.instruction
                )
                rows |= {number: (hidden[row], mask[row]) for row, number in enumerate(numbers)}
        several = [rows[number] for number in range(len(captions))]
        return {
            "encoder_hidden_states": torch.stack([hidden for hidden, _ in several]),
            "encoder_attention_mask": torch.stack([mask for _, mask in several]),
        }

    def _encoded(self, captions: list[str], instruction: str) -> tuple[Tensor, Tensor]:
        length = SANA_TOKENS + (len(self.text.tokenizer.encode(instruction)) - 2 if instruction else 0)
        tokens = self.text.tokens([instruction + caption.lower().strip() for caption in captions], length)
        hidden = self.text.encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        kept = [0, *range(length - SANA_TOKENS + 1, length)]
        return hidden[:, kept], tokens.attention_mask[:, kept]

    def said(self, captions: list[str]) -> Tensor:
        return self(captions)["encoder_attention_mask"].bool()


def _captions(parts: CaptionParts) -> CaptionEncoder:
    if parts.denoiser.config.guidance_embeds:
        raise UsageError(
            "the model is a Sana Sprint, whose distilled training is not known here: take its teacher, Sana"
        )
    import inspect

    from diffusers import SanaPipeline

    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    text = parts.encoders["text_encoder"]
    text.tokenizer.padding_side = "right"
    return SanaCaptions(text, "\n".join(instruction))


ARCHITECTURE = Architecture("SanaTransformer2DModel", "transformer", "cross-attn-kv", _captions)
