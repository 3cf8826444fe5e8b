"""Tars and images that nobody would write: nothing unaccounted for, nothing silent, no traceback.

Images are what Pillow's own writers make of every format and mode, whole, cut and with flipped bits; names are dotted
and hostile; tars are of every kind, whole, cut, flipped, compressed and joined.
"""

from __future__ import annotations

import functools
import gzip
import io
import tarfile
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from storage_schemas import tables
from tasks.inputs.tars import CAPTION_SUFFIXES, IMAGE_SUFFIXES, MAX_NAME, read_image, scan

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F"]
STEMS = [
    "a",
    "b",
    "a.b",
    "a.c",
    "a.b.c",
    "photo.v2.0001",
    "d/a",
    "d.e/a",
    "/abs/a",
    "../up",
    "..",
    ".",
    ".hidden",
    "._a",
]
STEMS += [
    "é😀",
    "a b\n\x1b[1m",
    "\udcff\udcfe",
    "x" * 120,
    "y/" * 90 + "z",
    "n." * 40 + "n",
    "q" * 5000,
    "-rf",
    "a..",
    "",
]
SUFFIXES = ["jpg", "JPG", "jpeg", "png", "webp", "txt", "json", "seg.png", "cls.txt", "cls", "npy", "pkl", "", "gif"]
KINDS = [tarfile.REGTYPE] * 12 + [tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE]
KINDS += [tarfile.GNUTYPE_SPARSE, tarfile.FIFOTYPE, tarfile.BLKTYPE]
CAPTIONS = [
    b"a cat",
    b"",
    b" \n",
    b"\xff\xfe",
    b'{"caption": "a cat"}',
    b'{"captions": ["a", 3]}',
    b"[" * 9999,
    b"a\0\x1b",
]


@functools.cache
def written_by_pillow() -> list[bytes]:
    """A picture of every format and mode that Pillow writes, some of several pictures."""
    Image.init()
    found = [b"", b"no image"]
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            for options in ({}, {"save_all": True, "append_images": [Image.new(mode, (5, 4), 1)]}):
                buffer = io.BytesIO()
                try:
                    Image.new(mode, (5, 4)).save(buffer, kind, **options)
                except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
                    continue  # a format that does not write this mode
                found.append(buffer.getvalue())
    return found


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


@st.composite
def images(draw: st.DrawFn) -> bytes:
    every = written_by_pillow()
    ours = [content for content in every if content.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF"))]
    content = draw(st.sampled_from(draw(st.sampled_from([ours, ours, every]))))
    change = draw(st.sampled_from(["none", "none", "none", "cut", "flip"]))
    if change == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if change == "flip":
        for bit in draw(st.lists(st.integers(0, 8 * len(content)), min_size=1, max_size=4)):
            content = flipped(content, bit)
    return content


@st.composite
def whole_tars(draw: st.DrawFn) -> bytes:
    buffer = io.BytesIO()
    kind = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    stems = draw(st.lists(st.sampled_from(STEMS), min_size=1, max_size=4))
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for _ in range(draw(st.integers(0, 8))):
            suffix = draw(st.sampled_from(SUFFIXES))
            member = tarfile.TarInfo(draw(st.sampled_from(stems)) + (f".{suffix}" if suffix else ""))
            member.type = draw(st.sampled_from(KINDS))
            if draw(st.booleans()):
                member.pax_headers = draw(
                    st.sampled_from([{"comment": "é"}, {"mtime": "1.5"}, {"GNU.sparse.major": "1"}])
                )
            content = draw(st.sampled_from(CAPTIONS) if suffix.endswith(CAPTION_SUFFIXES) else images())
            member.size = len(content) if member.isreg() and member.type != tarfile.GNUTYPE_SPARSE else 0
            member.linkname = "a.jpg" if member.islnk() or member.issym() else ""
            tar.addfile(member, io.BytesIO(content))
            if suffix.lower() in IMAGE_SUFFIXES and draw(st.booleans()):
                caption = tarfile.TarInfo(member.name.rpartition(".")[0] + ".txt")
                caption.size = 5
                tar.addfile(caption, io.BytesIO(b"a cat"))
    return buffer.getvalue()


@st.composite
def shards(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """What a shard holds, and a tar of the members that have to be accounted for where the shard is not named."""
    whole = draw(whole_tars())
    change = draw(st.sampled_from(["none"] * 5 + ["cut", "flip", "gzip", "junk", "joined"]))
    if change == "cut":
        return whole[: draw(st.integers(0, len(whole)))], whole
    if change == "flip":
        return (flips := flipped(whole, draw(st.integers(0, 8 * len(whole))))), flips
    if change == "gzip":
        return gzip.compress(whole, mtime=0), whole
    return whole + {"junk": b"x" * 700, "joined": whole}.get(change, b""), whole


def names_in(content: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:", encoding="utf-8") as tar:
        names = [member.name for member in tar if not member.isdir()]
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]


def check(shard: tuple[bytes, bytes]) -> Counter[str]:
    """Scan a shard as ingestion does, and hold what comes out against what went in."""
    content, members = shard
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.tar"
        path.write_bytes(content)
        samples, rejections = scan([path], lambda: None)
        for sample in samples:
            found = read_image(sample.shard, sample.offset, sample.size, sample.image_sha256)
            assert (found.mode, found.size) == ("RGB", (sample.width, sample.height))
            assert sample.captions and all(caption.strip() for caption in sample.captions)
    rows = pa.Table.from_pylist([asdict(item) for item in rejections], schema=tables.REJECTED_SAMPLES.schema)
    tables.REJECTED_SAMPLES.encode(rows, {})
    rows = pa.Table.from_pylist([{"train_id": 0, **asdict(item)} for item in samples], schema=tables.SAMPLES.schema)
    tables.SAMPLES.encode(rows, {})

    used, named = [sample.key for sample in samples], {rejection.key for rejection in rejections}
    assert len(set(used)) == len(used)
    assert samples or rejections, "silence"
    for rejection in rejections:
        assert rejection.reason and rejection.reason.isprintable() and " at 0x" not in rejection.reason
    outcome = Counter(used=len(samples), rejected=len(rejections), shard_named="" in named)
    if content[:2] == b"\x1f\x8b":
        assert "gzip" in rejections[0].reason
    if not any("damaged" in rejection.reason or "gzip" in rejection.reason for rejection in rejections):
        names = names_in(members)
        outcome["members"] = len(names)
        assert_accounted(names, {*used, *named})
    return outcome


def assert_accounted(names: list[str], keys: set[str]) -> None:
    """Every member is of a key that is used or named; what is a sample by itself is so under its own."""
    suffixes: dict[str, set[str]] = {}
    for name in names:
        if len(name) > MAX_NAME:
            assert name[:MAX_NAME] in keys
            continue
        base = name.rpartition("/")[2]
        cuts = [len(name) - len(base) + number for number, letter in enumerate(base) if letter == "."]
        assert keys.intersection([name, *(name[:cut] for cut in cuts)]), name
        stem, _, suffix = name.rpartition(".")
        suffixes.setdefault(stem, set()).add(suffix.lower())
    for stem, several in suffixes.items():
        if stem.rpartition("/")[2].strip(".") and several & set(IMAGE_SUFFIXES) and several & set(CAPTION_SUFFIXES):
            assert stem in keys


@pytest.mark.heavy
@settings(max_examples=100)
@given(shards())
def test_any_tar_is_accounted_for(shard: tuple[bytes, bytes]) -> None:
    check(shard)


@pytest.mark.slow
def test_five_thousand_tars_are_accounted_for() -> None:
    total: Counter[str] = Counter()

    @settings(max_examples=5000, database=None, suppress_health_check=list(HealthCheck))
    @given(shards())
    def fuzz(shard: tuple[bytes, bytes]) -> None:
        total.update(check(shard), tars=1)

    fuzz()
    print(dict(total))
    assert total["tars"] >= 5000 and total["used"] > 100
