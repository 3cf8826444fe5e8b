"""A question to the index, checked before what answers it is loaded."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fastgda_core.errors import BadSample, UsageError
from fastgda_core.images import decode_image
from storage_schemas.runs.liveness import read_assignment
from storage_schemas.workspace import Workspace


def read_picture(path: Path) -> Image.Image:
    """Read the image of a file.

    Raises:
        UsageError: it is no file, or holds no image; a pipe or a device is never read, as it may have no end.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is no file: give the path of a PNG, JPEG or WebP image")
    try:
        return decode_image(path.read_bytes())
    except (OSError, BadSample) as error:
        raise UsageError(f"{path}: {error}") from error


def check_sketched(workspace: Workspace, run: str) -> None:
    """Raise UsageError where a run keeps no sketches, StoreError where it was imported."""
    if "sketches" not in read_assignment(workspace, run).stages:
        raise UsageError(
            f"run {run} keeps no sketches: give its configuration a section sketches (`sketches: {{}}` takes the "
            "defaults) and start it again, which scores nothing anew"
        )


def check_caption(caption: str, called: str) -> None:
    """Raise UsageError where the caption is blank, as a training sample without a caption is refused.

    Args:
        called: what it is where it was given: an argument or an option.
    """
    if not caption.strip():
        raise UsageError(f"{called} is empty: give the caption that the image was generated from")
