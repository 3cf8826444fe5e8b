"""The release's denoiser, `model.bin`, as a diffusers model folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgda_core.diffusion.folder import read_index
from fastgda_core.errors import UsageError

SAMPLE_SIZE, HEAD_DIM = 16, 8  # which no weight's shape tells
PARTS = ("vae", "text_encoder", "tokenizer")  # of Stable Diffusion 2.1-base, which the release takes from there


def read_denoiser(path: Path) -> dict[str, Tensor]:
    """Read the weights; what the pickle says beside tensors is never run.

    Raises:
        UsageError: the file holds anything but tensors by name.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for damaged and for unsafe files
        raise UsageError(
            f"{path} is no file of plain tensors ({str(error).splitlines()[0]}): fetch it again"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UsageError(f"{path} is no state_dict, tensors by name: fetch it again")
    return weights


def unet_config(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the settings of the UNet2DConditionModel that weights are of, as far as their shapes tell.

    Raises:
        UsageError: the weights are those of no such network.
    """
    try:
        blocks = _count(weights, r"down_blocks\.(\d+)\.")
        attends = [f"down_blocks.{block}.attentions.0.proj_in.weight" in weights for block in range(blocks)]
        resnets = _count(weights, r"down_blocks\.0\.resnets\.(\d+)\.")
        first = attends.index(True)
        attention = f"down_blocks.{first}.attentions.0"
        return {
            "sample_size": SAMPLE_SIZE,
            "in_channels": weights["conv_in.weight"].shape[1],
            "out_channels": weights["conv_out.weight"].shape[0],
            "layers_per_block": resnets,
            "block_out_channels": [
                weights[f"down_blocks.{block}.resnets.0.conv1.weight"].shape[0] for block in range(blocks)
            ],
            "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)],
            "cross_attention_dim": weights[f"{attention}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "attention_head_dim": HEAD_DIM,
            "use_linear_projection": weights[f"{attention}.proj_in.weight"].ndim == 2,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"{path} has not the weights of a UNet2DConditionModel (no {error}): fetch it again") from None


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in weights if (found := re.match(pattern, name)))


def empty_unet(config: dict[str, Any]) -> Any:
    """Return the network without memory for its weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def check_unet(unet: Any, weights: dict[str, Tensor], path: Path) -> None:
    """Raise UsageError where the weights are not those of the network, by names and shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if different := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = different[0]
        raise UsageError(
            f"{path}: {len(different)} weights are not those of its UNet2DConditionModel, as {name}: "
            f"{found.get(name, 'missing')} and not {expected.get(name, 'there')}: fetch it again"
        )


def open_denoiser(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read `model.bin`, and return its weights and its network, which has no memory for weights.

    Raises:
        UsageError: the weights cannot be used.
    """
    weights = read_denoiser(path)
    unet = empty_unet(unet_config(weights, path))
    check_unet(unet, weights, path)
    return weights, unet


def write_model(weights: dict[str, Tensor], unet: Any, destination: Path, pipeline: Path | None) -> None:
    """Write the weights of a network as a model folder, unless it is there.

    Args:
        weights, unet: of `open_denoiser`.
        destination: the folder.
        pipeline: folder of Stable Diffusion 2.1-base, whose VAE, text encoder and tokenizer the model has; without it
            the folder lacks them, and no new queries can be scored with it.

    Raises:
        UsageError: the pipeline lacks a part.
    """
    classes = _classes(pipeline) if pipeline else {}
    if all((destination / name).exists() for name in ("model_index.json", *classes)):
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fastgda-tmp-") as scratch:
        folder = Path(scratch) / "model"
        _write_parts(folder, unet, weights)
        for part in classes:
            assert pipeline is not None
            shutil.copytree(pipeline / part, folder / part, copy_function=_linked)
        index = {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
            **classes,
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
        if destination.exists():
            destination.rename(Path(scratch) / "without_parts")
        folder.rename(destination)


def _classes(pipeline: Path) -> dict[str, Any]:
    """Return the entries of the pipeline's index for the parts that are taken over."""
    read_index(pipeline)  # which says what is missing
    index = json.loads((pipeline / "model_index.json").read_text())
    if missing := [part for part in PARTS if part not in index]:
        raise UsageError(f"--pipeline {pipeline} has no {missing[0]}: give Stable Diffusion 2.1-base's folder")
    return {part: index[part] for part in PARTS}


def _write_parts(folder: Path, unet: Any, weights: dict[str, Tensor]) -> None:
    from diffusers import DDPMScheduler

    (folder / "unet").mkdir(parents=True)
    unet.save_config(folder / "unet")
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    DDPMScheduler(num_train_timesteps=1000).save_pretrained(folder / "scheduler")


def _linked(source: str, destination: str) -> None:
    """Give a file a second name where both lie on one disk, else copy it: text encoders are large."""
    try:
        os.link(Path(source).resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)
