"""Pictures of samples and queries, resized, the latest in memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

from fastapi import Request
from fastapi.responses import Response
from PIL import Image

from fastgda_core.images import decode_image
from tasks.serving.catalogue import kind_of
from tasks.serving.http.problems import Problem
from tasks.serving.http.service import Service
from tasks.serving.http.settings import Limits

QUALITY = 85
FEW_PIXELS = 128 * 128  # JPEG of so few blurs edges that can be seen, and saves little
KEPT = "private, max-age=3600"  # an image that is taken down may be shown for so long by the browser that has it
# A picture is shown and never run, whatever else its bytes may be.
HEADERS = {"Content-Security-Policy": "default-src 'none'; sandbox", "Cache-Control": KEPT}


def tag_of(*parts: object) -> str:
    """Return the ETag of a picture that these tell from any other."""
    return '"' + hashlib.sha256(repr(parts).encode()).hexdigest()[:24] + '"'


def known(request: Request, tag: str) -> Response | None:
    """Return 304 where the client has the picture already."""
    given = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    if tag in given or "*" in given:
        return Response(status_code=304, headers={"ETag": tag, **HEADERS})
    return None


def picture_response(content: bytes, kind: str, tag: str) -> Response:
    return Response(content, media_type=kind, headers={"ETag": tag, **HEADERS})


def check_size(limits: Limits, size: int | None) -> None:
    """Raise Problem where a picture is asked for larger than pictures are resized to."""
    if size is not None and size > limits.thumbnail:
        raise Problem(422, f"size is {size}: {limits.thumbnail} at most, or none for the file as it is", "size")


async def thumbnail(service: Service, tag: str, read: Callable[[], bytes], size: int) -> Response:
    """Return a resized picture, from memory where it is there."""
    content = service.pictures.get(tag)
    service.metrics.thumbnails.labels("made" if content is None else "kept").inc()
    if content is None:
        content = await service.reading(lambda: resized(read, size))
        service.pictures.put(tag, content)
    return picture_response(content, kind_of(content), tag)


def resized(read: Callable[[], bytes], size: int) -> bytes:
    """Return a file's picture, its longer side `size` at most; it is never enlarged. Of few pixels PNG, else JPEG."""
    picture = decode_image(read())
    picture.thumbnail((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = io.BytesIO()
    if picture.width * picture.height <= FEW_PIXELS:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
