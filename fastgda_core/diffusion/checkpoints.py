"""Checkpoints of a model's training: folders with the denoiser's weights as of another step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

from fastgda_core.diffusion.folder import read_index
from fastgda_core.diffusion.weights import check_header, weight_files
from fastgda_core.errors import UsageError

WEIGHTS = "diffusion_pytorch_model.safetensors"
_MEND = "give a checkpoint of the model's own training, saved with save_pretrained()"


def check_checkpoint(checkpoint: Path, model: Path) -> None:
    """Check that a folder holds the denoiser of a model folder with other weights; gigabytes stay unread.

    Args:
        checkpoint: a model folder, or one with the denoiser's folder alone.
        model: the model's folder, whose own weights were checked before.

    Raises:
        UsageError: the folder, its weights or their config are missing or damaged, or of another architecture.
    """
    part = read_index(model).denoiser_part
    there, own = checkpoint / part, model / part
    if not there.is_dir():
        missing = "does not exist" if not checkpoint.is_dir() else f"has no folder {part}"
        raise UsageError(f"teacher.checkpoints: {checkpoint} {missing}: {_MEND}")
    files = weight_files(there / WEIGHTS)
    if not files or not (there / "config.json").is_file():
        raise UsageError(f"teacher.checkpoints: {there} lacks {'config.json' if files else WEIGHTS}: {_MEND}")
    _compare(there, "", _settings(there), _settings(own))
    _compare(there, "weight ", _shapes(files), _shapes(weight_files(own / WEIGHTS)))


def checkpoint_hash(checkpoint: Path, model: Path) -> str:
    """Return a sha256 over the names and contents of a checkpoint's weight files, wherever the folder lies."""
    digest = hashlib.sha256()
    for path in weight_files(checkpoint / read_index(model).denoiser_part / WEIGHTS):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _settings(part: Path) -> dict[str, object]:
    """Read what a denoiser's config says of the architecture; other releases of diffusers name more or fewer fields."""
    path = part / "config.json"
    try:
        document = json.loads(path.read_text())
        return {name: value for name, value in document.items() if not name.startswith("_")}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"teacher.checkpoints: {path} is no config ({error}): {_MEND}") from error


def _shapes(files: list[Path]) -> dict[str, object]:
    """Read the shapes of all weights from the headers of their files."""
    found: dict[str, object] = {}
    for path in files:
        check_header(path)
        with safe_open(path, framework="np") as file:
            found |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _compare(part: Path, what: str, found: dict[str, object], wanted: dict[str, object]) -> None:
    """Raise UsageError where a checkpoint's settings, or its weights, are not those of the model."""
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            told = f"{what}{name} is {found[name]} in {part} and {wanted[name]} in the model"
            raise UsageError(f"teacher.checkpoints: {told}: {_MEND}")
    if what and (odd := sorted(found.keys() ^ wanted.keys())):
        lacking = "the model" if odd[0] in found else str(part)
        raise UsageError(f"teacher.checkpoints: {lacking} has no {what}{odd[0]}, as the other has: {_MEND}")
