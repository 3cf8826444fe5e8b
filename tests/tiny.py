"""Tiny real things for tests: a diffusers model folder with random weights, and WebDataset tars."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

COLORS = ("red", "green", "blue", "orange", "purple", "black", "teal", "pink")
SHAPES = ("circle", "square", "cross")
WEIGHTS = (  # of a folder by `save_model`
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


def save_model(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """A Stable-Diffusion-shaped folder (VAE, CLIP text encoder, UNet) of a few thousand random weights."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    tokens = save_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    save_vae(folder / "vae")
    UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_tokenizer(folder: Path, tokens: int = 12) -> int:
    """A CLIP tokenizer of single letters, so many tokens a caption; returns how many words it knows."""
    characters = list("abcdefghijklmnopqrstuvwxyz")
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), model_max_length=tokens)
    vocabulary.unlink()
    merges.unlink()
    tokenizer.save_pretrained(folder)
    return len(words)


def save_vae(folder: Path) -> None:
    """An autoencoder of 16 x 16 pixels to 8 x 8 latents."""
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(folder)


def draw(number: int, side: int = 24) -> tuple[bytes, str]:
    """A JPEG of one coloured shape, different for every number, and its caption."""
    color, shape = COLORS[number % len(COLORS)], SHAPES[number // len(COLORS) % len(SHAPES)]
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), "white")
    left, top = (int(value) for value in rng.integers(1, side // 3, 2))
    box = (left, top, left + side // 2, top + side // 2)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.line(box, fill=color, width=3)
        pen.line((box[0], box[3], box[2], box[1]), fill=color, width=3)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), f"a {color} {shape} number {number}"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, content) members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample_members(numbers: range) -> list[tuple[str, bytes]]:
    """WebDataset members `s<number>.jpg` + `.txt`."""
    members = []
    for number in numbers:
        image, caption = draw(number)
        members += [(f"s{number:04d}.jpg", image), (f"s{number:04d}.txt", caption.encode())]
    return members


def save_checkpoint(model: Path, folder: Path, *, seed: int) -> Path:
    """A folder with the denoiser alone of a folder by `save_model`, a little off its weights."""
    shutil.copytree(model / "unet", folder / "unet")
    path, generator = folder / WEIGHTS[0], torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    moved = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(moved, path, {"format": "pt"})
    return folder
