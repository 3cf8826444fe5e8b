"""MSCOCO's caption files: the captions of pictures that lie as files in the folder that the file is named after."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastgda_core.errors import BadSample

CAPTIONS = 5  # of an image, the first in the order of the file: what the paper and its release use
PREFIX = "captions_"


@dataclass(frozen=True)
class CocoImage:
    """One entry of `images`, with its first captions."""

    file_name: str
    width: int
    height: int
    captions: list[str]


def is_captions_file(path: Path) -> bool:
    """Return whether a shard is such a file, and no tar."""
    return path.suffix == ".json"


def picture_folder(annotations: Path) -> Path:
    """Return where the pictures lie: `train2017` beside the folder of `annotations/captions_train2017.json`."""
    return annotations.parent.parent / annotations.stem.removeprefix(PREFIX)


def files_behind(shards: list[Path]) -> list[Path]:
    """Return the shards with the pictures that caption files among them name by their place."""
    pictures = [file for shard in shards if is_captions_file(shard) for file in sorted(picture_folder(shard).glob("*"))]
    return [*shards, *pictures]


def read_captions_file(path: Path) -> list[CocoImage]:
    """Return the images in the order of the file's `images`: the release's train_ids are the places in it.

    Raises:
        BadSample: the file is no caption file of MSCOCO, names an image twice, or names a file that is no plain name.
    """
    try:
        document = json.loads(path.read_bytes())
        images = {
            int(image["id"]): CocoImage(str(image["file_name"]), int(image["width"]), int(image["height"]), [])
            for image in document["images"]
        }
        for note in document["annotations"]:
            captions = images[int(note["image_id"])].captions
            if len(captions) < CAPTIONS and (caption := " ".join(str(note["caption"]).split())):
                captions.append(caption)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadSample(f"is no caption file of MSCOCO ({told}): fetch it again") from error
    if len(images) < len(document["images"]):
        raise BadSample("names an image twice, and places in it are train_ids: fetch it again")
    for image in images.values():
        if Path(image.file_name).name != image.file_name:
            raise BadSample(f"names the file {image.file_name!r:.80}, which is no plain name: fetch it again")
    return list(images.values())
