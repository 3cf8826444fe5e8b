"""Decode the images of tars, queries and requests: all the same way, to 8-bit RGB, upright, on white."""

from __future__ import annotations

import io
import itertools
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fastgda_core.errors import BadSample

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 64  # images that may wait decoded: 50 MB of 512 x 512
_FORMATS = ("JPEG", "PNG", "WEBP")
# The errors that Pillow raises on damaged files. With -W error its warning is an error too.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes) -> Image.Image:
    """Decode a file to RGB: turned as its EXIF says, transparency on white, the first picture where it holds several.

    Raises:
        BadSample: not an image, damaged, absurdly large, or of a mode without a sure meaning in RGB.
    """
    return decode_first(content)[0]


def decode_first(content: bytes) -> tuple[Image.Image, int]:
    """Decode as `decode_image` does, and return the image and how many pictures the file holds.

    Raises:
        BadSample: as `decode_image`.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        pictures = getattr(image, "n_frames", 1)
        _refuse_huge(image)
        _mend_transparency(image)
        image.load()
        rgb = as_rgb(image)
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample("image does not decode (it is no JPEG, PNG or WebP): replace it") from None
    except _DAMAGE as error:
        raise BadSample(f"image does not decode ({error}): replace it") from error
    turn = _UPRIGHT.get(_orientation(image))
    return (rgb if turn is None else rgb.transpose(turn)), pictures


def in_threads(read: Callable[[Item], Result], items: Sequence[Item], size: int) -> Iterator[list[Result]]:
    """Yield what `read` returns for the items, in order, in batches of `size`; threads read ahead.

    Pillow decodes without Python's lock, so images are made ready while a device computes.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    remaining = iter(items)
    begun: deque[Future[Result]] = deque()
    try:
        for start in range(0, len(items), size):
            count = min(size, len(items) - start)
            for item in itertools.islice(remaining, count + AHEAD - len(begun)):
                begun.append(pool.submit(read, item))
            yield [begun.popleft().result() for _ in range(count)]
    finally:
        pool.shutdown(cancel_futures=True)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB, transparency on white.

    Raises:
        BadSample: the range of the image's values is not known.
    """
    if image.mode == "F" or (image.mode == "I" and not _fits_16_bits(image)):
        raise BadSample(f"image of mode {image.mode}, whose values have no known range: store it with 8 bits a channel")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _refuse_huge(image: Image.Image) -> None:
    """Raise `BadSample` for an image above Pillow's limit of pixels.

    Pillow only warns, and a warning is no guard where several threads set filters.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        size = f"{image.width} x {image.height}"
        raise BadSample(f"image does not decode ({size}, where {limit} pixels are the limit): shrink it")


def _mend_transparency(image: ImageFile.ImageFile) -> None:
    """Scale a PNG's transparent colour as Pillow scales the pixels; Pillow leaves the colour as it is.

    Raises:
        BadSample: a transparent colour of 16 bits cannot be compared with pixels of 8.
    """
    colour, rawmode = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if isinstance(colour, int) and rawmode in ("L", "L;2", "L;4"):
        depth = {"L": 8, "L;2": 2, "L;4": 4}[rawmode]
        image.info["transparency"] = colour % 2**depth * (255 // (2**depth - 1))
    elif colour is not None and rawmode == "RGB;16B":
        raise BadSample("image of 16 bits a channel with a transparent colour: store it with 8 bits a channel")


def _fits_16_bits(image: Image.Image) -> bool:
    least, most = np.asarray(image).min(), np.asarray(image).max()
    return bool(least >= 0 and most < 2**16)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Return grey of 16 bits as grey of 8, with alpha where one grey is transparent."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, where there is none or the EXIF is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (*_DAMAGE, AttributeError, RecursionError):
        return 1
    return value if isinstance(value, int) else 1


def square(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` pixels with antialiasing and crop the centre."""
    return filling(image, side, side)


def filling(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize with antialiasing to the least size that fills width x height pixels, and crop the centre."""
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
