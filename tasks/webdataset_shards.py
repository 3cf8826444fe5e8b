"""Read WebDataset tars: where each image lies, its captions, and what is wrong with the rest.

Nothing is extracted and nothing but images, text and JSON is ever decoded.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastgda_core.errors import BadSample, UsageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIXES = ("txt", "json")
MAX_MEMBER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ShardSample:
    """One usable sample of a tar."""

    shard: str
    key: str
    offset: int
    size: int
    captions: list[str]
    width: int
    height: int
    image_sha256: str


@dataclass(frozen=True)
class Rejection:
    """Something unusable: a sample, or a whole shard where `key` is empty."""

    shard: str
    key: str
    reason: str


def find_shards(pattern: str, field: str) -> list[Path]:
    """The tars that a glob of the config names, sorted.

    Raises:
        UsageError: none.
    """
    shards = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]  # noqa: PTH207
    if not shards:
        raise UsageError(f"{field} matches no file: {pattern}; give a glob of WebDataset tars such as data/*.tar")
    return shards


def scan(shards: list[Path], on_shard: Callable[[], None]) -> tuple[list[ShardSample], list[Rejection]]:
    """Check every sample of every shard; bad ones are named, never raised."""
    samples: list[ShardSample] = []
    rejections: list[Rejection] = []
    seen: dict[str, str] = {}
    for shard in shards:
        before = len(samples) + len(rejections)
        for item in _scan_shard(shard):
            if isinstance(item, ShardSample) and item.key in seen:
                rejections.append(
                    Rejection(item.shard, item.key, f"duplicate key, first seen in {seen[item.key]}: rename one")
                )
            elif isinstance(item, ShardSample):
                seen[item.key] = item.shard
                samples.append(item)
            else:
                rejections.append(item)
        if len(samples) + len(rejections) == before:
            rejections.append(Rejection(str(shard), "", "the shard is empty: remove it or write it again"))
        on_shard()
    return samples, rejections


def read_image(shard: str, offset: int, size: int, sha256: str | None = None) -> Image.Image:
    """One image by its place in a tar, as RGB on white.

    Raises:
        BadSample: its bytes are not those of this digest, or no image.
    """
    with Path(shard).open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise BadSample("the image changed since its tar was indexed: restore the tar")
    return decode_image(content)


def decode_image(content: bytes) -> Image.Image:
    """Decode to RGB, transparency on white.

    Raises:
        BadSample: not an image, damaged, or absurdly large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"image does not decode ({error}): replace it") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _scan_shard(shard: Path) -> Iterator[ShardSample | Rejection]:
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    duplicates: dict[str, Rejection] = {}
    damage: Rejection | None = None
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, suffix = _split_name(member.name)
                if not member.isreg() or suffix not in IMAGE_SUFFIXES + CAPTION_SUFFIXES:
                    continue
                if suffix in members.setdefault(key, {}):
                    reason = f"duplicate key: {_printable(member.name)} occurs twice; rename one"
                    duplicates[key] = Rejection(str(shard), _printable(key), reason)
                else:
                    members[key][suffix] = member
            _check_end(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        damage = Rejection(str(shard), "", f"the tar is damaged ({error}): samples before the damage are used")
    if members:
        with shard.open("rb") as file:
            for key, parts in members.items():
                try:
                    yield _check_sample(shard, _printable(key), parts, file)
                except BadSample as error:
                    yield Rejection(str(shard), _printable(key), str(error))
    yield from duplicates.values()
    if damage is not None:
        yield damage


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a file cut between two members for a whole one: ask for the zero block that ends a tar."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end mark where the last readable member ends")


def _printable(name: str) -> str:
    """Member names are bytes: those that are not UTF-8 show them as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file name, the rest is the suffix."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _check_sample(shard: Path, key: str, parts: dict[str, tarfile.TarInfo], file: io.BufferedReader) -> ShardSample:
    def content(member: tarfile.TarInfo) -> bytes:
        if member.size > MAX_MEMBER_BYTES:
            raise BadSample(f"{_printable(member.name)} is larger than {MAX_MEMBER_BYTES >> 20} MiB: shrink it")
        file.seek(member.offset_data)
        whole = file.read(member.size)
        if len(whole) < member.size:
            raise BadSample(f"{_printable(member.name)} is cut short: write the shard again")
        return whole

    images = [parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts]
    if len(images) != 1:
        problem = "has no image: add a" if not images else "has several images: keep one"
        raise BadSample(f"{problem} .jpg, .png or .webp")
    captions = _captions({suffix: content(parts[suffix]) for suffix in CAPTION_SUFFIXES if suffix in parts})
    encoded = content(images[0])
    width, height = decode_image(encoded).size
    return ShardSample(
        str(shard),
        key,
        images[0].offset_data,
        len(encoded),
        captions,
        width,
        height,
        hashlib.sha256(encoded).hexdigest(),
    )


def _captions(texts: dict[str, bytes]) -> list[str]:
    """Captions of a sample: `captions` or `caption` of its .json, else its .txt."""
    try:
        decoded = {suffix: text.decode("utf-8-sig") for suffix, text in texts.items()}
        document = json.loads(decoded["json"]) if "json" in decoded else {}
        found = document.get("captions") or document.get("caption") if isinstance(document, dict) else None
        found = found or decoded.get("txt", "")
        listed = found if isinstance(found, list) else [found]
        captions = [" ".join(caption.split()) for caption in listed if isinstance(caption, str) and caption.strip()]
        "".join(captions).encode()  # JSON can spell lone surrogates, which no file can hold
    except (ValueError, RecursionError) as error:
        raise BadSample(f"caption does not decode ({error}): write it as UTF-8") from error
    if not captions:
        raise BadSample("has no caption: add a .txt, or a .json with caption or captions")
    return list(dict.fromkeys(captions))
