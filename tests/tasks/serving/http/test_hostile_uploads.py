"""A thousand uploads that are no honest image: each is refused with a reason, and memory stays where it was."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from tasks.serving.http.problems import Problem
from tasks.serving.http.settings import Limits
from tasks.serving.http.uploads import decoded
from tests import tiny

MEBIBYTE = 1 << 20
GROWTH = 64 * MEBIBYTE  # of the resident set over all uploads; a bomb that went off would take gigabytes
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:///etc/passwd"/></svg>'


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, *, rows: int = 0, depth: int = 8, kind: int = 2, more: bytes = b"") -> bytes:
    """A PNG whose head promises so many pixels, and whose data holds zeros for some rows."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(rows * (3 * width + 1)), 9))
    return b"\x89PNG\r\n\x1a\n" + head + more + data + chunk(b"IEND", b"")


def webp_of(width: int, height: int) -> bytes:
    body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    content = b"WEBPVP8X" + struct.pack("<I", len(body)) + body + b"VP8 " + struct.pack("<I", 4) + b"\0\0\0\0"
    return b"RIFF" + struct.pack("<I", len(content)) + content


def kinds() -> dict[str, tuple[bytes, int]]:
    """Uploads of which one of a kind is enough, with the status that they get."""
    small = Image.new("RGB", (16, 16), "teal")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    jpeg = encoded(small, "JPEG", progressive=True)
    scan = jpeg[jpeg.index(b"\xff\xda") : -2]
    return {
        "nothing": (b"", 400),
        "a text": (b"hello", 400),
        "svg": (SVG, 400),
        "html": (b"<!doctype html><script>alert(1)</script>", 400),
        "pdf": (b"%PDF-1.7\n" + bytes(500), 400),
        "zip": (b"PK\x03\x04" + bytes(500), 400),
        "gif": (encoded(small, "GIF"), 400),
        "bmp": (encoded(small, "BMP"), 400),
        "tiff": (encoded(small, "TIFF"), 400),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400),
        "animated png": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), 400),
        "animated webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), 400),
        "cmyk": (encoded(small.convert("CMYK"), "JPEG"), 400),
        "16 bits of grey": (encoded(Image.new("I;16", (16, 16), 300), "PNG"), 400),
        "16 bits of colour": (png_of(4, 4, depth=16), 400),
        "bomb of a head": (png_of(60_000, 60_000), 413),
        "bomb of a head beyond Pillow's patience": (png_of(2**31 - 1, 2**31 - 1), 413),
        "bomb of zeros": (png_of(5000, 5000, rows=5000), 413),
        "webp of a head": (webp_of(16_384, 16_384), 413),
        "webp of nonsense": (webp_of(16, 16), 400),
        "jpeg of many scans": (jpeg[:-2] + 5000 * scan + b"\xff\xd9", 400),
        "text chunk that unpacks to much": (
            png_of(4, 4, rows=4, more=chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80 * MEBIBYTE), 9))),
            400,
        ),
        "profile that unpacks to much": (
            png_of(4, 4, rows=2, more=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(80 * MEBIBYTE), 9))),
            400,
        ),
        "svg behind a head": (b"\x89PNG\r\n\x1a\n" + SVG, 400),
        "jpeg's beginning and nothing": (b"\xff\xd8\xff\xe0", 400),
    }


def spoilt(seed: int) -> bytes:
    """An image that is cut, or has its head or its body overwritten, or both."""
    draw = random.Random(seed)
    kind = draw.choice(["PNG", "JPEG", "WEBP"])
    whole = encoded(Image.open(io.BytesIO(tiny.draw(seed % 24, 64)[0])), kind)
    content = bytearray(whole[: draw.randrange(8, max(9, len(whole) // 2))])
    for _ in range(draw.randrange(4)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def resident() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.heavy
def test_a_thousand_hostile_uploads_are_refused_in_bounded_memory(
    client: TestClient, record_property: pytest.RecordProperty
) -> None:
    for number in range(20):  # whatever is imported or allocated once
        client.post("/v1/attribute", files={"image": ("x", spoilt(10_000 + number))}, data={"caption": "x"})
    uploads = list(_uploads())  # made before: some are packed from 80 MB of zeros
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = resident()
    for name, content, status in uploads:
        response = client.post(
            "/v1/attribute", files={"image": ("../../../etc/passwd\0.png", content, "image/png")}, data={"caption": "x"}
        )
        assert response.status_code == status, (name, response.status_code, response.text)
        told = response.json()
        assert told["where"] == "image" and told["error"] and "\n" not in told["error"], name
    grown = peak() - before
    record_property("peak_growth_mebibytes", grown / MEBIBYTE)
    print(f"peak growth {grown / MEBIBYTE:.1f} MiB")
    assert grown < GROWTH


def _uploads() -> Iterator[tuple[str, bytes, int]]:
    for name, (content, status) in kinds().items():
        yield name, content, status
    for seed in range(1000 - len(kinds())):
        yield f"spoilt {seed}", spoilt(seed), 400


def test_forms_of_too_many_or_wrong_parts_are_refused(client: TestClient) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    ask = lambda parts: client.post("/v1/attribute", content=b"".join(parts) + b"--b--\r\n", headers=kind)  # noqa: E731
    many = [part % (b"k", b"", b"1")] * 100_000
    several = [part % (b"image", b'; filename="a"', b"x")] * 2
    twice = [part % (b"k", b"", b"1")] * 2
    elsewhere = [part % (b"caption", b'; filename="a"', b"x")]
    large = [part % (b"caption", b"", b"x" * MEBIBYTE)]
    address = [part % (b"image", b"", b"http://127.0.0.1/x.png"), part % (b"caption", b"", b"x")]
    nested = [b"--b\r\n" + b"X-Header: 1\r\n" * 10_000 + b"\r\nx\r\n"]
    for parts in (many, several, twice, elsewhere, large, address, nested):
        response = ask(parts)
        assert response.status_code in (400, 413), response.text
        assert response.json()["error"]


def test_a_small_image_is_decoded_as_it_is_and_settings_of_pillow_stay() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    image = Image.new("RGB", (40, 30), "teal")
    for kind in ("PNG", "JPEG", "WEBP"):
        assert decoded(encoded(image, kind), Limits()).size == (40, 30)
        with pytest.raises(Problem, match="40 x 30 pixels"):
            decoded(encoded(image, kind), Limits(pixels=1199))
    for mode in ("1", "L", "LA", "P", "RGBA"):
        assert decoded(encoded(image.convert(mode), "PNG"), Limits()).mode == "RGB"
    assert limit == Image.MAX_IMAGE_PIXELS
