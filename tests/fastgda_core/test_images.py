"""Images of every mode against arithmetic of our own: no second decoder is asked."""

from __future__ import annotations

import colorsys
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.errors import BadSample
from fastgda_core.images import as_rgb, decode_first, decode_image

Pixels = NDArray[np.uint8]
RNG = np.random.default_rng(0)
NOISE: Pixels = RNG.integers(0, 256, (9, 7, 4), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, rows: list[bytes], width: int, transparent: bytes = b"") -> bytes:
    """A PNG of these packed rows: Pillow writes few depths itself."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def grey(values: NDArray[Any]) -> Pixels:
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=2)


def on_white(colour: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    share = alpha[..., None].astype(float) / 255
    return colour * share + 255 * (1 - share)


def assert_close(image: Image.Image, expected: NDArray[Any], within: float) -> None:
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).astype(float), expected.astype(float), atol=within)


def test_every_grey_of_16_bits_becomes_the_nearest_of_8() -> None:
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    expected = grey(np.rint(values / 65535 * 255))
    assert_close(decode_image(encode(Image.fromarray(values))), expected, 0)
    assert_close(as_rgb(Image.fromarray(values.astype(np.int32))), expected, 0)
    assert_close(decode_image(png(16, 0, [row.astype(">u2").tobytes() for row in values], 256)), expected, 0)


def test_a_transparent_grey_of_16_bits_is_white() -> None:
    row = np.array([0, 300, 301, 40_000], ">u2")
    found = decode_image(png(16, 0, [row.tobytes()], 4, struct.pack(">H", 300)))
    assert np.asarray(found)[0, :, 0].tolist() == [0, 255, 1, 156]


@pytest.mark.parametrize(("depth", "packed"), [(1, b"\x50"), (2, b"\x1b"), (4, b"\x05\xaf")])
@pytest.mark.parametrize("transparent", [None, 0, 1])
def test_greys_of_few_bits(depth: int, packed: bytes, transparent: int | None) -> None:
    levels = {1: [0, 1, 0, 1], 2: [0, 1, 2, 3], 4: [0, 5, 10, 15]}[depth]
    chosen = None if transparent is None else levels[transparent]
    found = decode_image(png(depth, 0, [packed], 4, b"" if chosen is None else struct.pack(">H", chosen)))
    expected = [255 if level == chosen else level * 255 // (2**depth - 1) for level in levels]
    assert np.asarray(found)[0, :, 1].tolist() == expected


def test_16_bits_a_channel_are_cut_to_8() -> None:
    values = RNG.integers(0, 2**16, (5, 6, 4), dtype=np.uint16)
    colour, alpha = values[..., :3], values[..., 3]
    rows = [row.astype(">u2").tobytes() for row in colour]
    assert_close(decode_image(png(16, 2, rows, 6)), colour / 257, 1)
    rows = [row.astype(">u2").tobytes() for row in values]
    assert_close(decode_image(png(16, 6, rows, 6)), on_white(colour / 257, alpha / 257), 2)
    rows = [row[:, 2:].astype(">u2").tobytes() for row in values]
    assert_close(decode_image(png(16, 4, rows, 6)), on_white(values[..., [2, 2, 2]] / 257, alpha / 257), 2)


def test_a_transparent_colour_of_16_bits_a_channel_is_refused_by_name() -> None:
    with pytest.raises(BadSample, match="16 bits a channel with a transparent colour"):
        decode_image(png(16, 2, [bytes(12)], 2, bytes(6)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_laid_on_white(kind: str) -> None:
    options = {"WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    expected = on_white(NOISE[..., :3], NOISE[..., 3])
    assert_close(decode_image(encode(Image.fromarray(NOISE), kind, **options)), expected, 1)
    two = Image.merge("LA", [Image.fromarray(NOISE[..., band].copy()) for band in (0, 3)])
    assert_close(decode_image(encode(two, kind, **options)), on_white(NOISE[..., [0, 0, 0]], NOISE[..., 3]), 1)
    premultiplied = Image.fromarray(NOISE).convert("RGBa")
    assert_close(as_rgb(premultiplied), on_white(NOISE[..., :3], NOISE[..., 3]), 3)


@pytest.mark.parametrize("transparency", [None, 2, bytes([255, 128, 0, 7])])
def test_palettes_with_and_without_transparency(transparency: int | bytes | None) -> None:
    palette = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    index = RNG.integers(0, 4, (6, 5), dtype=np.uint8)
    image = Image.fromarray(index).convert("P")
    image.putdata(index.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    alphas = np.full(4, 255)
    if transparency is not None:
        alphas = np.array([255, 255, 0, 255]) if transparency == 2 else np.frombuffer(transparency, np.uint8)
    options = {} if transparency is None else {"transparency": transparency}
    expected = on_white(palette[index], alphas[index])
    assert_close(decode_image(encode(image, **options)), expected, 1)
    image.info |= options
    assert_close(as_rgb(image.convert("PA")), expected, 1)


def test_a_transparent_colour_is_white() -> None:
    pixels = np.array([[[10, 20, 30], [10, 20, 31]]], np.uint8)
    found = decode_image(encode(Image.fromarray(pixels), transparency=(10, 20, 30)))
    assert np.asarray(found).tolist() == [[[255] * 3, [10, 20, 31]]]


def test_one_bit_is_black_and_white() -> None:
    bits = RNG.integers(0, 2, (8, 11)).astype(bool)
    assert_close(decode_image(encode(Image.fromarray(bits))), grey(bits * 255), 0)


def lab_to_rgb(lab: NDArray[Any]) -> NDArray[np.float64]:
    """CIE Lab under D50, as ICC profiles have it, to sRGB."""
    lightness, a, b = (lab[..., band].astype(float) for band in range(3))
    fy = (lightness * 100 / 255 + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * [0.9642, 1.0, 0.8249]
    # Lindbloom: XYZ under D50 to linear sRGB.
    matrix = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(xyz @ matrix.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def by_colorsys(hsv: Pixels) -> NDArray[np.float64]:
    return 255 * np.array([[colorsys.hsv_to_rgb(*(pixel / 255)) for pixel in row] for row in hsv])


def by_bt601(ycc: Pixels) -> NDArray[np.float64]:
    y, cb, cr = (ycc[..., band].astype(float) - (0, 128, 128)[band] for band in range(3))
    return np.clip(np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1), 0, 255)


def by_inks(cmyk: Pixels) -> NDArray[np.float64]:
    return (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255


@pytest.mark.parametrize(
    ("mode", "truth", "within"),
    [("CMYK", by_inks, 1), ("YCbCr", by_bt601, 2), ("HSV", by_colorsys, 3), ("RGBX", lambda p: p[..., :3], 0)],
)
def test_other_colour_spaces(mode: str, truth: Callable[[Pixels], NDArray[Any]], within: float) -> None:
    pixels = NOISE if mode in ("CMYK", "RGBX") else NOISE[..., :3].copy()
    assert_close(as_rgb(Image.frombytes(mode, (7, 9), pixels.tobytes())), truth(pixels), within)


def test_lab() -> None:
    lab = np.array([[[128, 0, 0], [200, 20, 30], [100, -30, 20], [60, 10, -20]]])
    image = Image.frombytes("LAB", (4, 1), lab.astype(np.int8).tobytes())
    assert_close(as_rgb(image), lab_to_rgb(lab), 4)


def test_a_jpeg_of_inks_is_not_inverted() -> None:
    inks = np.full((16, 16, 4), [200, 40, 90, 30], np.uint8)
    found = decode_image(encode(Image.frombytes("CMYK", (16, 16), inks.tobytes()), "JPEG", quality=100))
    assert_close(found, by_inks(inks), 4)


@pytest.mark.parametrize("image", [Image.new("F", (2, 2)), Image.new("I", (2, 2), 70_000), Image.new("I", (2, 2), -1)])
def test_a_mode_without_a_known_range_is_refused_by_name(image: Image.Image) -> None:
    with pytest.raises(BadSample, match=f"mode {image.mode}"):
        as_rgb(image)


# EXIF 2.3, tag 0x0112: at which side of the picture, as it is meant, the first row and the first column lie.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", SIDES)
def test_a_photograph_is_turned_upright(orientation: int, kind: str) -> None:
    meant = np.asarray(Image.fromarray(NOISE[:3, :2, :3].copy()).resize((32, 48), Image.Resampling.NEAREST))
    row, column = SIDES[orientation]
    stored = meant if row in ("top", "bottom") else meant.swapaxes(0, 1)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = decode_image(encode(Image.fromarray(stored.copy()), kind, exif=exif, **options))
    assert found.size == (32, 48)
    assert_close(found, meant, 8 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"nonsense", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x05\x01\x12"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_says_nothing(exif: bytes, kind: str) -> None:
    assert decode_image(encode(Image.new("RGB", (4, 6)), kind, exif=b"Exif\0\0" + exif)).size == (4, 6)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_the_first_picture_of_several_is_used_and_they_are_counted(kind: str) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    several = encode(red, kind, save_all=True, append_images=[blue, red], quality=100)
    found, pictures = decode_first(several)
    assert pictures == 3
    assert_close(found, np.full((8, 8, 3), [255, 0, 0]), 3)
    assert decode_first(encode(red))[1] == 1


@pytest.mark.heavy
def test_decoding_leaves_the_warnings_of_other_threads_alone() -> None:
    content = encode(Image.new("RGB", (4000, 4000)))
    before, seen = list(warnings.filters), []
    thread = threading.Thread(target=decode_image, args=(content,))
    thread.start()
    while thread.is_alive():
        seen.append(list(warnings.filters) == before)
    assert all(seen)
