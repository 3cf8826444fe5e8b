"""Images that strangers send: looked at before they are decoded, and refused with a reason.

Nothing here changes a setting of Pillow's that other threads share.
"""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from fastgda_core.errors import BadSample
from fastgda_core.images import decode_first
from tasks.serving.http.problems import Problem, one_line
from tasks.serving.http.settings import Limits

SCANS = 100  # of a progressive JPEG: cameras write 10, and each one costs a pass over all pixels
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def decoded(content: bytes, limits: Limits) -> Image.Image:
    """Decode an image that came with a question; its pixels are counted before any of them is decoded.

    Raises:
        Problem: it is no image, damaged, too large, animated, or of a kind whose colours have no sure meaning.
    """
    if content.startswith(b"RIFF"):  # Pillow makes room for a WebP's pixels as it opens the file
        _check_pixels(*_webp_size(content), limits)
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > SCANS:
        raise _refused(f"image is a JPEG of more than {SCANS} scans: store it anew")
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_pixels(*image.size, limits)
            _check_kind(image)
        return decode_first(content)[0]
    except Problem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Problem(413, f"image has far more pixels than {limits.pixels}: shrink it", "image") from None
    except UnidentifiedImageError:
        raise _refused("image is no PNG, JPEG or WebP file, or a damaged one") from None
    except BadSample as error:
        raise _refused(one_line(error)) from None
    except Exception as error:  # whatever a decoder says of bytes that somebody made up
        raise _refused(f"image does not decode ({one_line(error)[:200]}): replace it") from None


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise Problem(413, f"image has {width} x {height} pixels: shrink it to {limits.pixels} at most", "image")


def _check_kind(image: ImageFile) -> None:
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise _refused("image is an animation: send the picture that is meant")
    raw = image.tile[0][3] if image.tile else ""
    if image.mode.startswith("I") or "16" in str(raw):
        raise _refused("image has 16 bits a channel: store it with 8")
    if image.mode not in _MODES:
        raise _refused(f"image is of mode {image.mode}, whose colours depend on a printer: convert it to RGB")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Return width and height from a WebP's first chunk (RFC 9649); zeros where it is no such chunk."""
    kind, body = content[12:16], content[20:30]
    if len(body) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _refused(why: str) -> Problem:
    return Problem(400, why, "image")
