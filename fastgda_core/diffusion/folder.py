"""The index of a diffusers model folder: which parts it has, of which classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastgda_core.diffusion.architectures.architecture import Architecture
from fastgda_core.diffusion.architectures.registry import ARCHITECTURES
from fastgda_core.errors import UsageError

DENOISERS = ("unet", "transformer")  # the folders that a denoiser may lie in
# The classes that replaced Transformer2DModel in diffusers, by norm_type: DiT and PixArt were published under its name.
OLD_TRANSFORMERS = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class ModelIndex:
    """The content of `model_index.json`.

    pipeline: the pipeline's class; classes: the class of each part; labels: names of DiT's image classes by number;
    zeros_for_empty_caption: SDXL's embedding of the empty caption is zero.
    """

    pipeline: str
    classes: dict[str, str]
    labels: dict[str, str]
    zeros_for_empty_caption: bool

    @property
    def denoiser_part(self) -> str:
        """The denoiser's folder, `unet` or `transformer`."""
        return next(part for part in DENOISERS if part in self.classes)

    @property
    def architecture(self) -> Architecture:
        """What is known of the denoiser's class."""
        return ARCHITECTURES[self.classes[self.denoiser_part]]

    @property
    def parts(self) -> list[str]:
        """The folders that this model needs."""
        part = self.denoiser_part
        if not self.architecture.encodes_text:
            return [part, "scheduler", "vae"]
        encoders = [name for name in TEXT_ENCODERS if name in self.classes] or ["text_encoder"]
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
        return [part, "scheduler", "vae", *encoders, *tokenizers]


def read_index(folder: Path) -> ModelIndex:
    """Read `model_index.json` of a model folder, and check that every part that the model needs is there.

    Raises:
        UsageError: the folder has not the layout of a diffusers text-to-image model that is known here.
    """
    if not folder.is_dir():
        raise UsageError(f"model.folder {folder} does not exist: give a diffusers model folder (with model_index.json)")
    path = folder / "model_index.json"
    if not path.exists():
        raise UsageError(f"model.folder {folder} lacks model_index.json: save the model with save_pretrained()")
    try:
        document = json.loads(path.read_text())
        index = ModelIndex(
            str(document.get("_class_name")),
            _present_names(
                folder, {p: entry[1] for p, entry in document.items() if isinstance(entry, list) and entry[1]}
            ),
            {str(number): str(names) for number, names in (document.get("id2label") or {}).items()},
            bool(document.get("force_zeros_for_empty_prompt", True)),  # the default of SDXL's pipeline
        )
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} is no model index: save the model again ({error})") from error
    denoiser = next((index.classes[part] for part in DENOISERS if part in index.classes), "missing")
    if denoiser not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"{path}: the denoiser is {denoiser}: known are {known} (docs/teachers.md: one file adds one)")
    if denoiser != index.classes.get(index.architecture.part):
        raise UsageError(f"{path}: the denoiser, {denoiser}, is no part named {ARCHITECTURES[denoiser].part}")
    if missing := [name for name in index.parts if not (folder / name).exists()]:
        raise UsageError(f"model.folder {folder} lacks {', '.join(missing)}: save the model with save_pretrained()")
    return index


def _present_names(folder: Path, classes: dict[str, str]) -> dict[str, str]:
    """Return the same classes, with an old transformer's class under its present name in diffusers."""
    config = folder / "transformer" / "config.json"
    if classes.get("transformer") != "Transformer2DModel" or not config.exists():
        return classes
    norm_type = json.loads(config.read_text()).get("norm_type")
    return {**classes, "transformer": OLD_TRANSFORMERS.get(norm_type, "Transformer2DModel")}
