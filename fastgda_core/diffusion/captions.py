"""Encoders from captions to a denoiser's conditions, as the diffusers pipeline of each model makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastgda_core.diffusion.folder import ModelIndex
from fastgda_core.diffusion.pretrained import load_frozen
from fastgda_core.errors import UsageError

# Captions to the denoiser's keyword arguments (`loss.Condition`), one row per caption.
CaptionEncoder = Callable[[list[str]], dict[str, Tensor]]


@runtime_checkable
class CaptionTokens(Protocol):
    """A caption encoder whose condition has the captions' tokens, `encoder_hidden_states`."""

    def __call__(self, captions: list[str]) -> dict[str, Tensor]: ...

    def said(self, captions: list[str]) -> Tensor:
        """Return which of the tokens are not padding, (n, tokens) bool."""


PIXART_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
SD3_T5_TOKENS = 256


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
    resolution: int
    zeros_for_empty: bool

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, pooled = zip(*(encoder.penultimate_and_pooled(captions) for encoder in self.encoders), strict=True)
        text, text_embeds = torch.cat(hidden, dim=-1), pooled[-1]
        if self.zeros_for_empty:
            said = torch.tensor([bool(caption) for caption in captions], device=text.device)
            text, text_embeds = text * said[:, None, None], text_embeds * said[:, None]
        side = float(self.resolution)
        time_ids = text_embeds.new_tensor([side, side, 0, 0, side, side]).expand(len(captions), 6)
        return {
            "encoder_hidden_states": text,
            "added_cond_kwargs.text_embeds": text_embeds,
            "added_cond_kwargs.time_ids": time_ids,
        }

    def said(self, captions: list[str]) -> Tensor:
        return self.encoders[0].said(captions)


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


@dataclass(frozen=True)
class PixArtCaptions:
    """PixArt: T5 over the lower-case caption, padding hidden; large models are also told the image's size."""

    text: TextEncoder
    tokens: int
    resolution: int | None

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        tokens = self.text.tokens([caption.lower().strip() for caption in captions], self.tokens)
        hidden = self.text.encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        condition = {"encoder_hidden_states": hidden, "encoder_attention_mask": tokens.attention_mask}
        if self.resolution is not None:
            count, side = len(captions), float(self.resolution)
            condition["added_cond_kwargs.resolution"] = hidden.new_full((count, 2), side)
            condition["added_cond_kwargs.aspect_ratio"] = hidden.new_ones(count, 1)
        return condition

    def said(self, captions: list[str]) -> Tensor:
        return self(captions)["encoder_attention_mask"].bool()


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


def load_caption_encoder(folder: Path, index: ModelIndex, denoiser: Any, codec_factor: int) -> CaptionEncoder:
    """Load the caption encoder of a model folder.

    Args:
        folder: the model folder.
        index: its index.
        denoiser: the loaded denoiser, which tells the kind of model and the device.
        codec_factor: pixels per latent position, along a side.
    """
    device, config = denoiser.device, denoiser.config
    resolution = config.sample_size * codec_factor
    encoders = {part: _load(folder, part, index, device) for part in index.parts if part.startswith("text_encoder")}
    match type(denoiser).__name__:
        case "DiTTransformer2DModel":
            numbers = {name.strip(): int(number) for number, names in index.labels.items() for name in names.split(",")}
            return ClassLabels(numbers, config.num_embeds_ada_norm, device)
        case "SD3Transformer2DModel":
            clips = [encoders["text_encoder"], encoders["text_encoder_2"]]
            return StableDiffusion3Captions(clips, encoders.get("text_encoder_3"), config.joint_attention_dim)
        case "PixArtTransformer2DModel":
            tokens = PIXART_TOKENS.get(index.pipeline, PIXART_TOKENS["PixArtAlphaPipeline"])
            return PixArtCaptions(
                encoders["text_encoder"], tokens, resolution if denoiser.use_additional_conditions else None
            )
        case _ if config.addition_embed_type == "text_time":
            both = [encoders["text_encoder"], encoders["text_encoder_2"]]
            return StableDiffusionXLCaptions(both, resolution, index.zeros_for_empty_caption)
        case _:
            return StableDiffusionCaptions(encoders["text_encoder"])


def _load(folder: Path, part: str, index: ModelIndex, device: torch.device) -> TextEncoder:
    import transformers

    encoder = load_frozen(getattr(transformers, index.classes[part]), folder / part, device, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder / part.replace("text_encoder", "tokenizer"), local_files_only=True
    )
    return TextEncoder(tokenizer, encoder, device)
