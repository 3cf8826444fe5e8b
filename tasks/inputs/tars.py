"""Read WebDataset tars: where each image lies, its captions, and what is wrong with the rest.

A key is what is before the last dot of a file name, so that `photo.v2.0001.jpg` and `photo.v2.0001.txt` are a sample.
A member under a longer key without an image and a caption of its own, `0001.seg.png`, is a companion of sample `0001`.
Nothing is extracted and nothing but images, text and JSON is ever decoded.

`webdataset` writes the demo's tars and is not used to read: its samples have no byte offsets, by which images are
fetched again. It also takes a tar that is cut between two members, and the first of two joined ones, for a whole one,
drops links silently, and ends a key at the first dot, so that `photo.v2.0001` and `photo.v2.0002` are one sample.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastgda_core.errors import BadSample, UsageError
from fastgda_core.images import decode_first, decode_image, in_threads
from fastgda_core.interruption import checkpoint
from tasks.inputs.coco import CocoImage, is_captions_file, picture_folder, read_captions_file
from tasks.inputs.looks import look_of
from tasks.inputs.metadata import metadata_of

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIXES = ("txt", "json")
MAX_MEMBER_BYTES = 256 * 2**20
MAX_CAPTIONS = 2**15  # which noise plans tell apart
MAX_NAME = 4096  # characters: what a path may have on Linux
AT_ONCE = 64  # samples between two looks for a wish to stop
RULES = 2  # of what is a sample: a tar that was read by other rules is read again
_EMPTY = "the shard is empty: write it again"
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}
# The errors that tarfile raises on hostile headers, beside its own errors.
_DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, LookupError, OverflowError, MemoryError, RecursionError)


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
    image_look: bytes
    metadata: str
    """JSON object of the further fields of its .json."""
    pictures: int
    """Number of pictures in the image's file, of which the first is used."""


@dataclass(frozen=True)
class Rejection:
    """Something unusable: a sample, or a whole shard where `key` is empty."""

    shard: str
    key: str
    reason: str


def matching_files(pattern: str) -> list[Path]:
    """The files that a glob names, sorted."""
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]  # noqa: PTH207


def find_shards(pattern: str, field: str) -> list[Path]:
    """Return the tars that a glob of the config names, sorted.

    Raises:
        UsageError: the glob matches no file.
    """
    shards = matching_files(pattern)
    if not shards:
        raise UsageError(f"{field} matches no file: {pattern}; give a glob of WebDataset tars such as data/*.tar")
    return shards


def scan(shards: list[Path], on_shard: Callable[[], None]) -> tuple[list[ShardSample], list[Rejection]]:
    """Check every sample of every shard; bad ones are named, never raised."""
    samples: list[ShardSample] = []
    rejections: list[Rejection] = []
    seen: dict[str, str] = {}
    for shard in shards:
        for item in scan_shard(shard):
            if isinstance(item, ShardSample) and item.key in seen:
                rejections.append(Rejection(item.shard, item.key, taken_key(seen[item.key])))
            elif isinstance(item, ShardSample):
                seen[item.key] = item.shard
                samples.append(item)
            else:
                rejections.append(item)
        on_shard()
    return samples, rejections


def scan_shard(shard: Path, share: int = 0, of: int = 1) -> Iterator[ShardSample | Rejection]:
    """Check every sample of a shard, or of one of several equal shares of it; bad ones are named, never raised.

    All shares together, in order, are the whole. The last one names what is wrong with the shard itself.
    """
    scanned = _scan_captions_file(shard, share, of) if is_captions_file(shard) else _scan_tar(shard, share, of)
    for checked in scanned:
        checkpoint()
        yield from checked


def taken_key(shard: str) -> str:
    """Say why a sample is rejected whose key a sample of `shard` has."""
    return f"duplicate key, first seen in {shard}: rename one"


def read_image(shard: str, offset: int, size: int, sha256: str | None = None) -> Image.Image:
    """Read one image by its place in a tar, as RGB on white.

    Raises:
        BadSample: the bytes are not those of this digest, or no image.
    """
    with Path(shard).open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise BadSample("the image changed since its tar was indexed: restore the tar")
    return decode_image(content)


def _scan_captions_file(annotations: Path, share: int, of: int) -> Iterator[list[ShardSample | Rejection]]:
    """Check a share of the images of a caption file of MSCOCO, in its order; each picture is a file of its own."""
    folder = picture_folder(annotations)
    try:
        images = read_captions_file(annotations)
        if not folder.is_dir():
            raise BadSample(f"has no pictures beside it: there is no folder {folder}")
    except BadSample as error:
        if share == of - 1:
            yield [Rejection(str(annotations), "", str(error))]
        return

    def check(image: CocoImage) -> ShardSample | Rejection:
        picture = folder / image.file_name
        try:
            return _check_picture(picture, image)
        except (BadSample, OSError) as error:
            reason = str(error) if isinstance(error, BadSample) else f"{error.strerror}: fetch it again"
            return Rejection(str(picture), picture.stem, reason)

    yield from in_threads(check, images[share * len(images) // of : (share + 1) * len(images) // of], AT_ONCE)
    if not images and share == of - 1:
        yield [Rejection(str(annotations), "", _EMPTY)]


def _check_picture(picture: Path, image: CocoImage) -> ShardSample:
    if picture.stat().st_size > MAX_MEMBER_BYTES:
        raise BadSample(f"is larger than {MAX_MEMBER_BYTES >> 20} MiB: shrink it")
    if not image.captions:
        raise BadSample("has no caption: add one to the caption file")
    content = picture.read_bytes()
    decoded, pictures = decode_first(content)
    return ShardSample(
        str(picture),
        picture.stem,
        0,
        len(content),
        list(dict.fromkeys(image.captions)),
        decoded.width,
        decoded.height,
        hashlib.sha256(content).hexdigest(),
        look_of(decoded),
        "{}",
        pictures,
    )


def _scan_tar(shard: Path, share: int, of: int) -> Iterator[list[ShardSample | Rejection]]:
    """Check the samples whose first member begins in one of several equal shares of a tar's bytes.

    All headers are read for each share, which takes 20 microseconds a member where a sample takes milliseconds.
    """
    members: list[tarfile.TarInfo] = []
    damage: Rejection | None = None
    try:
        with tarfile.open(shard, "r:", encoding="utf-8") as tar:
            for member in tar:
                if member.size < 0:  # tarfile would step back and read the same members for ever
                    raise tarfile.ReadError("a member of negative size")
                if not member.isdir():
                    members.append(member)
            _check_end(tar)
    except _DAMAGE as error:
        damage = Rejection(str(shard), "", _describe_damage(shard, error, begins_well=bool(members)))
    if members:
        size = shard.stat().st_size
        first, last = share * size // of, (share + 1) * size // of if share < of - 1 else None
        with shard.open("rb") as file:
            yield from _check_members(shard, members, file, first, last)
    if share == of - 1:
        yield [damage] if damage is not None else []
        yield [] if members or damage else [Rejection(str(shard), "", _EMPTY)]


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless the tar ends with its end mark.

    tarfile takes a file cut between two members for a whole one, and stops at the first block of zeros.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end mark where the last readable member ends")
    while block := tar.fileobj.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more data behind its end mark, as where tars are joined without tar --concatenate")


def _describe_damage(shard: Path, error: BaseException, *, begins_well: bool) -> str:
    if not begins_well and shard.is_file():
        with shard.open("rb") as file:
            start = file.read(8)
        for mark, name in _COMPRESSIONS.items():
            if start.startswith(mark):
                return f"the shard is a {name} file: unpack it to a plain tar, in which images have a fixed place"
    return f"the tar is damaged ({error}): samples before the damage are used"


def _check_members(
    shard: Path, members: list[tarfile.TarInfo], file: io.BufferedReader, first: int, last: int | None
) -> Iterator[list[ShardSample | Rejection]]:
    """Account for every member: it is of a sample, or a companion of one, or a rejection has its key.

    Samples are those whose first member lies from byte `first` on to before byte `last`. Of a tar's names too long are
    told with the first of them, and of members that are no samples with the last, where `last` is None.
    """
    if not first:
        reason = f"its name is longer than {MAX_NAME} characters: shorten it"
        long = [_printable(member.name)[:MAX_NAME] for member in members if len(member.name) > MAX_NAME]
        yield [Rejection(str(shard), name, reason) for name in long]
    keyed, duplicates, others = _by_key([member for member in members if len(member.name) <= MAX_NAME])
    complete = {key for key, parts in keyed.items() if _is_complete(parts)}

    def check(key: str) -> ShardSample | Rejection:
        try:
            return _check_sample(shard, _printable(key), keyed[key], file)
        except BadSample as error:
            return Rejection(str(shard), _printable(key), str(error))

    chosen = [
        key
        for key, parts in keyed.items()
        # Not `0001.seg.png` beside `0001.jpg` and `0001.txt`.
        if (key in complete or complete.isdisjoint(_shorter_keys(key))) and _begins_within(parts, first, last)
    ]
    yield from in_threads(check, chosen, AT_ONCE)
    if last is None:
        yield [
            Rejection(str(shard), _printable(key), f"duplicate key: its .{suffix} occurs twice; rename one")
            for key, suffix in duplicates.items()
        ]
        possible = ([*_shorter_keys(key), key] for key in others)
        strange = dict.fromkeys(keys[0] for keys in possible if keyed.keys().isdisjoint(keys))
        reason = "is no sample: no image and no caption has this key"
        yield [Rejection(str(shard), _printable(key), reason) for key in strange]


def _begins_within(parts: dict[str, tarfile.TarInfo], first: int, last: int | None) -> bool:
    begin = next(iter(parts.values())).offset
    return first <= begin and (last is None or begin < last)


def _by_key(
    members: list[tarfile.TarInfo],
) -> tuple[dict[str, dict[str, tarfile.TarInfo]], dict[str, str], list[str]]:
    """Return images and captions by key and suffix, key and suffix of what occurs again, and keys of all others."""
    keyed: dict[str, dict[str, tarfile.TarInfo]] = {}
    duplicates: dict[str, str] = {}
    others: list[str] = []
    for member in members:
        key, suffix = _split_name(member.name)
        if suffix not in IMAGE_SUFFIXES + CAPTION_SUFFIXES:
            others.append(key)
        elif suffix in keyed.setdefault(key, {}):
            duplicates.setdefault(key, suffix)
        else:
            keyed[key][suffix] = member
    return keyed, duplicates, others


def _is_complete(parts: dict[str, tarfile.TarInfo]) -> bool:
    return not any(parts.keys().isdisjoint(suffixes) for suffixes in (IMAGE_SUFFIXES, CAPTION_SUFFIXES))


def _printable(name: str) -> str:
    """Return a member's name as text: names are bytes, and bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _split_name(name: str) -> tuple[str, str]:
    """Return key and suffix, before and behind the last dot of the file name; `.x` and `..` have no suffix."""
    stem, _, suffix = name.rpartition(".")
    return (stem, suffix.lower()) if stem.rpartition("/")[2].strip(".") and "/" not in suffix else (name, "")


def _shorter_keys(key: str) -> list[str]:
    """Return what is before each dot of a key's file name, the shortest first, which is WebDataset's key."""
    base = key.rpartition("/")[2].lstrip(".")
    start = len(key) - len(base)
    return [key[: start + number] for number, letter in enumerate(base) if letter == "." and number]


def _check_sample(shard: Path, key: str, parts: dict[str, tarfile.TarInfo], file: io.BufferedReader) -> ShardSample:
    def content(suffix: str) -> bytes:
        member = parts[suffix]
        if member.size > MAX_MEMBER_BYTES:
            raise BadSample(f"its .{suffix} is larger than {MAX_MEMBER_BYTES >> 20} MiB: shrink it")
        # Not by `seek` and `read`: several threads check samples of this file.
        whole = os.pread(file.fileno(), member.size, member.offset_data)
        if len(whole) < member.size:
            raise BadSample(f"its .{suffix} is cut short: write the shard again")
        return whole

    for suffix, member in parts.items():
        if not member.isreg() or member.issparse():
            raise BadSample(f"its .{suffix} is a link, a device or sparse: store the whole file in the tar")
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in parts]
    if len(images) != 1:
        problem = "has no image: add a" if not images else "has several images: keep one"
        raise BadSample(f"{problem} .jpg, .png or .webp")
    captions, metadata = _captions({suffix: content(suffix) for suffix in CAPTION_SUFFIXES if suffix in parts})
    encoded = content(images[0])
    image, pictures = decode_first(encoded)
    return ShardSample(
        str(shard),
        key,
        parts[images[0]].offset_data,
        len(encoded),
        captions,
        image.width,
        image.height,
        hashlib.sha256(encoded).hexdigest(),
        look_of(image),
        metadata,
        pictures,
    )


def _captions(texts: dict[str, bytes]) -> tuple[list[str], str]:
    """Return the captions of a sample: `captions` or `caption` of its .json, else its .txt; and its `metadata_of`."""
    try:
        decoded = {suffix: text.decode("utf-8-sig") for suffix, text in texts.items()}
        document = json.loads(decoded["json"]) if "json" in decoded else {}
        fields = document if isinstance(document, dict) else {}
        found = fields.get("captions") or fields.get("caption") or decoded.get("txt", "")
        listed = found if isinstance(found, list) else [found]
        captions = [" ".join(caption.split()) for caption in listed if isinstance(caption, str) and caption.strip()]
        "".join(captions).encode()  # JSON can spell lone surrogates, which no file can hold
    except (ValueError, RecursionError) as error:
        raise BadSample(f"caption does not decode ({error}): write it as UTF-8") from error
    if not captions:
        raise BadSample("has no caption: add a .txt, or a .json with caption or captions")
    different = list(dict.fromkeys(captions))
    if len(different) > MAX_CAPTIONS:
        raise BadSample(f"has {len(different):,} captions: a sample may have {MAX_CAPTIONS:,}")
    return different, metadata_of(fields)
