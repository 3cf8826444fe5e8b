"""Tiny model folders of random weights, one for each architecture: a few thousand weights, real classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests import tiny

TEXT = 16  # width of every text encoder
LABELS = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "red circle"}


def save_sdxl(folder: Path) -> Path:
    """Two CLIP encoders side by side, pooled text and image size beside the timestep."""
    _start(folder)
    _clip(folder, "text_encoder", seed=1, kind=CLIPTextModel)
    _clip(folder, "text_encoder_2", seed=2)
    UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * TEXT,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + TEXT,
    ).save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=100).save_pretrained(folder / "scheduler")
    return _finish(
        folder,
        "StableDiffusionXLPipeline",
        unet="UNet2DConditionModel",
        text_encoder="CLIPTextModel",
        text_encoder_2="CLIPTextModelWithProjection",
        force_zeros_for_empty_prompt=True,
    )


def save_sd3(folder: Path, *, t5: bool = True) -> Path:
    """Joint attention, two CLIP encoders with or without T5, flow matching."""
    _start(folder)
    _clip(folder, "text_encoder", seed=1)
    _clip(folder, "text_encoder_2", seed=2)
    if t5:
        _t5(folder, "text_encoder_3", width=40)
    SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=2 * TEXT,
        out_channels=4,
        pos_embed_max_size=8,
    ).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0).save_pretrained(folder / "scheduler")
    return _finish(
        folder,
        "StableDiffusion3Pipeline",
        transformer="SD3Transformer2DModel",
        text_encoder="CLIPTextModelWithProjection",
        text_encoder_2="CLIPTextModelWithProjection",
        text_encoder_3="T5EncoderModel" if t5 else None,
    )


def save_pixart(folder: Path, *, sizes: bool = False) -> Path:
    """Cross-attention over T5, a learned variance; the large model is also told the image's size."""
    _start(folder)
    _t5(folder, "text_encoder", width=TEXT)
    PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=12,  # two heads of it: the size embeddings want a width that three divides
        num_attention_heads=2,
        cross_attention_dim=24,
        caption_channels=TEXT,
        use_additional_conditions=sizes,
    ).save_pretrained(folder / "transformer")
    DDIMScheduler(num_train_timesteps=100).save_pretrained(folder / "scheduler")
    return _finish(folder, "PixArtAlphaPipeline", transformer="PixArtTransformer2DModel", text_encoder="T5EncoderModel")


def save_dit(folder: Path) -> Path:
    """Captions are the names of classes; a learned variance."""
    _start(folder)
    DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=len(LABELS),
    ).save_pretrained(folder / "transformer")
    DDIMScheduler(num_train_timesteps=100).save_pretrained(folder / "scheduler")
    return _finish(folder, "DiTPipeline", transformer="DiTTransformer2DModel", id2label=LABELS)


def save_flux(folder: Path, *, distilled: bool = True) -> Path:
    """Joint attention over packed latents, blocks of one stream, a guidance that the model is told.

    Its config names no size: 1,024 pixels, unless a `resolution` is given.
    """
    _start(folder)
    _clip(folder, "text_encoder", seed=1, kind=CLIPTextModel)
    _t5(folder, "text_encoder_2", width=24)
    FluxTransformer2DModel(
        in_channels=16,  # 2 x 2 positions of 4 channels
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=TEXT,
        guidance_embeds=distilled,
        axes_dims_rope=(2, 2, 4),
    ).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=100).save_pretrained(folder / "scheduler")
    return _finish(
        folder,
        "FluxPipeline",
        transformer="FluxTransformer2DModel",
        text_encoder="CLIPTextModel",
        text_encoder_2="T5EncoderModel",
    )


def save_sana(folder: Path) -> Path:
    """Linear attention, Gemma's tokens behind an instruction, a deep codec, a flow that another solver follows."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41,
    ).save_pretrained(folder / "vae")
    words = _save_words(folder / "tokenizer", "<bos>")
    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=words,
        hidden_size=TEXT,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    Gemma2Model(config).save_pretrained(folder / "text_encoder")
    SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
        sample_size=8,
    ).save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler(
        num_train_timesteps=100, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    folder_index = _finish(folder, "SanaPipeline", transformer="SanaTransformer2DModel", text_encoder="Gemma2Model")
    change_json(folder / "model_index.json", vae=["diffusers", "AutoencoderDC"])
    return folder_index


SAVE: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.save_model,
    "sdxl": save_sdxl,
    "sd3": save_sd3,
    "pixart": save_pixart,
    "pixart-sized": partial(save_pixart, sizes=True),
    "dit": save_dit,
    "flux": save_flux,
    "sana": save_sana,
}


def change_json(path: Path, **values: Any) -> None:
    """Set entries of a config; None takes one out."""
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


def _start(folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    tiny.save_vae(folder / "vae")


def _clip(folder: Path, part: str, *, seed: int, kind: type = CLIPTextModelWithProjection) -> None:
    torch.manual_seed(seed)
    tokens = tiny.save_tokenizer(folder / part.replace("text_encoder", "tokenizer"))
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=TEXT,
        projection_dim=TEXT,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
    )
    kind(config).save_pretrained(folder / part)


def _t5(folder: Path, part: str, *, width: int) -> None:
    words = _save_words(folder / part.replace("text_encoder", "tokenizer"), "</s>")
    config = T5Config(
        vocab_size=words, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    T5EncoderModel(config).save_pretrained(folder / part)


def _save_words(folder: Path, special: str) -> int:
    """A tokenizer of whole words, which ends a caption with `</s>` or begins it with `<bos>`; returns how many."""
    words = ["<pad>", special, "<unk>", *"abcdefghijklmnopqrstuvwxyz", "red", "circle"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"$A {special}" if special == "</s>" else f"{special} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(special, 1)])
    kind = {"eos_token" if special == "</s>" else "bos_token": special}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=512, **kind
    ).save_pretrained(folder)
    return len(words)


def _finish(folder: Path, pipeline: str, **parts: Any) -> Path:
    index: dict[str, Any] = {"_class_name": pipeline, "vae": ["diffusers", "AutoencoderKL"]}
    for name, value in parts.items():
        is_class = name.startswith(("text_encoder", "transformer", "unet"))
        library = None if value is None else "transformers" if name.startswith("text") else "diffusers"
        index[name] = [library, value] if is_class else value
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
