"""Encoders from captions to a denoiser's conditions, as the diffusers pipeline of each model makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastgda_core.diffusion.pretrained import load_frozen

# Captions to the denoiser's keyword arguments (`loss.Condition`), one row per caption.
CaptionEncoder = Callable[[list[str]], dict[str, Tensor]]


@runtime_checkable
class CaptionTokens(Protocol):
    """A caption encoder whose condition has the captions' tokens, `encoder_hidden_states`."""

    def __call__(self, captions: list[str]) -> dict[str, Tensor]: ...

    def said(self, captions: list[str]) -> Tensor:
        """Return which of the tokens are not padding, (n, tokens) bool."""


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and the transformer behind it."""

    tokenizer: Any
    encoder: Any
    device: torch.device

    def tokens(self, captions: list[str], length: int | None = None) -> Any:
        """Tokenize captions, padded and cut to `length`, by default the tokenizer's limit."""
        return self.tokenizer(
            captions,
            padding="max_length",
            max_length=length or self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)

    def last_hidden(self, captions: list[str]) -> Tensor:
        """Return the last hidden state, (n, tokens, d)."""
        tokens = self.tokens(captions)
        # As Stable Diffusion's pipeline does: padding is hidden only from encoders whose config asks for it.
        hide_padding = getattr(self.encoder.config, "use_attention_mask", False)
        return self.encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask if hide_padding else None)[
            0
        ]

    def said(self, captions: list[str], length: int | None = None) -> Tensor:
        """Return which tokens are not padding, (n, tokens) bool."""
        return self.tokens(captions, length).attention_mask.bool()

    def penultimate_and_pooled(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return the last but one hidden state, (n, tokens, d), and the first output, which CLIP's projection pools."""
        output = self.encoder(input_ids=self.tokens(captions).input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]


def load_text_encoder(folder: Path, part: str, kind: str, device: torch.device) -> TextEncoder:
    """Load a text encoder of a model folder, and its tokenizer.

    Args:
        folder: the model folder.
        part: as `text_encoder_2`.
        kind: its class in transformers.
        device: where to put the encoder.
    """
    import transformers

    encoder = load_frozen(getattr(transformers, kind), folder / part, device, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder / part.replace("text_encoder", "tokenizer"), local_files_only=True
    )
    return TextEncoder(tokenizer, encoder, device)
