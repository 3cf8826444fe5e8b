"""A whole run of Stable Diffusion 1.4's size, with random weights, through the real command; Markdown tables.

It draws tars of random pictures, writes model and CLIP folders of the published shapes, runs `fastgda run` on them, and
asks for answers of each tier. Costs do not depend on weights; quality is not looked at.

Run: PYTHONPATH=. python benchmarks/sd_run.py --folder big-and-empty
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from benchmarks.sd_unet import SIZES as UNETS
from benchmarks.sd_unet import device_name
from fastgda_core.diffusion.precision import Precision
from tests import tiny

PRECISIONS = (Precision.bf16, Precision.tf32, Precision.float32)
TIMESTEPS, PAIRS, TOKENS = 10, 64, 77
WORDS = ("red", "green", "blue", "round", "square", "tall", "house", "tree", "dog", "boat", "river", "moon")
ASKED = 5  # times per tier, after one that does not count


@dataclass(frozen=True)
class Size:
    """What to run on: the folder's shapes and how much of everything."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]
    samples: int
    queries: int
    pixels: int
    micro_batch: int
    triples: int  # of the Fisher
    pilot: int  # samples by whose gradients the sketch is chosen
    coordinates: int


SIZES = {
    # CompVis/stable-diffusion-v1-4 and openai/clip-vit-large-patch14, their config.json.
    "sd": Size(
        UNETS["sd"].denoiser,
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
            "sample_size": 512,
        },
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
        samples=256,
        queries=8,
        pixels=512,
        micro_batch=32,
        triples=128,
        pilot=256,
        coordinates=65_536,
    ),
    # For a look at the logic on a CPU.
    "tiny": Size(
        UNETS["tiny"].denoiser,
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 16,
        },
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        samples=24,
        queries=8,
        pixels=16,
        micro_batch=16,
        triples=16,
        pilot=16,
        coordinates=64,
    ),
}


def save_model(folder: Path, size: Size) -> None:
    """Save a Stable Diffusion folder of random weights."""
    torch.manual_seed(0)
    tokens = tiny.save_tokenizer(folder / "tokenizer", TOKENS)
    ends = {"vocab_size": tokens, "bos_token_id": tokens - 2, "eos_token_id": tokens - 1}
    CLIPTextModel(CLIPTextConfig(**size.text, **ends, max_position_embeddings=TOKENS)).save_pretrained(
        folder / "text_encoder"
    )
    AutoencoderKL(**size.vae).save_pretrained(folder / "vae")
    UNet2DConditionModel(**size.unet).save_pretrained(folder / "unet")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def save_clip(folder: Path, size: Size) -> None:
    """Save a CLIP of random weights, whose image side is used."""
    tokens = tiny.save_tokenizer(folder, TOKENS)
    width = {"projection_dim": size.text["hidden_size"]}
    ends = {"vocab_size": tokens, "bos_token_id": tokens - 2, "eos_token_id": tokens - 1}
    text = {**size.text, **width, **ends, "max_position_embeddings": TOKENS}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**size.vision, **width}, **width)).save_pretrained(folder)


def caption(number: int) -> str:
    """Return three words, others for every number below 1,728."""
    return " ".join(WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(3))


def members(size: Size) -> Iterator[tuple[str, bytes]]:
    """Yield JPEGs of coarse random colours with their captions, as members of a tar."""
    rng = np.random.default_rng(0)
    for number in range(size.samples):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        kept = io.BytesIO()
        coarse.resize((size.pixels, size.pixels), Image.Resampling.BICUBIC).save(kept, "JPEG", quality=90)
        yield f"{number:06d}.jpg", kept.getvalue()
        yield f"{number:06d}.txt", caption(number).encode()


def write_config(folder: Path, size: Size, device: torch.device, precision: Precision, *, compiled: bool) -> Path:
    """Write the configuration of the run: the amortised teacher, an exact check, sketches."""
    document = {
        "name": "sd-run",
        "workspace": "workspace",
        "device": device.type,
        "data": {"shards": "shards/*.tar"},
        "model": {"folder": "model", "micro_batch": size.micro_batch, "compile": compiled},
        "queries": {
            "captions": [caption(1000 + number) for number in range(size.queries)],
            "split": {"train": size.queries // 2, "validation": size.queries // 4, "test": size.queries // 4},
            "steps": TIMESTEPS,
            "twins": 2,
        },
        "features": {"space": "clip", "weights": {"clip": "clip"}},
        "candidates": {"policy": "all"},
        "curvature": {"samples": size.triples},
        "teacher": {
            "name": "abu_plus_first_order",
            "alpha": 0.002,
            "precision": precision.value,
            "timesteps": TIMESTEPS,
            "gradient_pairs": PAIRS,
            "shard_samples": size.samples,
        },
        "sketches": {"pilot": size.pilot, "coordinates": size.coordinates},
        "exact_check": {"queries": 1, "candidates": size.samples // 8},
        "self_consistency": {"queries": 1, "samples": 16},
        "head": {"epochs": 2},
        "evaluation": {"cutoffs": [5], "validation_cutoff": 5, "gain_floor": None},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def ran(config: Path, log: Path) -> bool:
    """Run the whole pipeline by its command, and print what it prints: its stages' seconds; False if it fails."""
    started = time.perf_counter()
    command = [sys.executable, "-c", "from flows.commands.main import main; main()", "run", str(config)]
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    print(f"`fastgda run`: {time.perf_counter() - started:.0f} s\n\n```\n{done.stdout}```")
    if done.returncode:
        print(f"ended with {done.returncode}:\n{log.read_text()}")
    return done.returncode == 0


def print_answers(workspace: Path) -> None:
    """Print how long one picture takes, by tier, in a process that has answered before."""
    from storage_schemas.workspace import Workspace
    from tasks.serving.attributor import Attributor

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    print("\n| tier | one answer, ms |\n| --- | ---: |")
    attributor = Attributor(Workspace.at(workspace), load=["fast", "sketch"])
    for tier in ("fast", "sketch"):
        seconds = []
        for _ in range(1 + ASKED):
            started = time.perf_counter()
            attributor.attribute(image, "a red house", 10, tier)
            seconds.append(time.perf_counter() - started)
        print(f"| {tier} | {statistics.median(seconds[1:]) * 1e3:,.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="12 GB are written into it")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser")
    parser.add_argument("--size", choices=SIZES, default="sd", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size == "sd" and not torch.cuda.is_available():
        parser.error("it takes a CUDA device")
    size, folder = SIZES[arguments.size], arguments.folder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "prefect"))
    print(f"{device_name(device)}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}.")
    save_model(folder / "model", size)
    save_clip(folder / "clip", size)
    tiny.write_tar(folder / "shards" / "0.tar", list(members(size)))
    for precision in PRECISIONS:  # random weights agree with float64 less well than trained ones
        print(f"\n### {precision}\n")
        config = write_config(folder, size, device, precision, compiled=arguments.compile)
        if ran(config, folder / f"{precision}.log"):
            print_answers(folder / "workspace")
            break


if __name__ == "__main__":
    main()
