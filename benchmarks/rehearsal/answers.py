"""Ten answers of a running service, as a picture: each query beside its top training images."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from tasks.serving.answers import Hit
from tasks.serving.client import Asked, Client

SHOWN, TILE, GAP, LABEL = 8, 64, 6, 16


@dataclass(frozen=True)
class Shown:
    """One answer: the query's caption and picture, its hits and their pictures, and the milliseconds."""

    caption: str
    query: bytes
    hits: list[Hit]
    pictures: list[bytes]
    milliseconds: float


def ask(url: str, answers: int, split: str = "test") -> list[Shown]:
    """Ask a service about pictures of stored queries, as of any picture; the first question is not counted."""
    client, found = Client(url), []
    queries = client.queries(split, limit=answers)
    for query in [queries[0], *queries]:
        image = client.query_image(query["query_id"])
        started = time.perf_counter()
        answer = client.attribute(Asked(image=image, caption=query["caption"], k=SHOWN))
        seconds = time.perf_counter() - started
        pictures = [client.sample_image(hit.train_id) for hit in answer.hits]
        found.append(Shown(query["caption"], image, answer.hits, pictures, 1000 * seconds))
    return found[1:]


def sheet(answers: Sequence[Shown]) -> bytes:
    """Draw a PNG: a row for each answer, the query's picture first."""
    height = LABEL + TILE + GAP
    drawn = Image.new("RGB", ((SHOWN + 1) * (TILE + GAP) + 2 * GAP, len(answers) * height + GAP), "white")
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(11)
    for row, answer in enumerate(answers):
        top = GAP + row * height
        pen.text((GAP, top), answer.caption[:80], fill="#2d3748", font=font)
        for column, content in enumerate([answer.query, *answer.pictures]):
            tile = Image.open(io.BytesIO(content)).convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
            drawn.paste(tile, (GAP + column * (TILE + GAP) + (GAP if column else 0), top + LABEL))
        pen.line((TILE + 2 * GAP, top + LABEL, TILE + 2 * GAP, top + LABEL + TILE), fill="#a0aec0", width=2)
    buffer = io.BytesIO()
    # Flat pictures: 256 colours are nearly all there are, and a third of the bytes.
    drawn.quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
