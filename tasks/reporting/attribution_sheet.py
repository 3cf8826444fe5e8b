"""A picture of attributions for an artifact."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

from storage_schemas.snapshots.snapshots import read_ranks
from storage_schemas.tombstones import removed_ids, without
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import readable_images

TILE, GAP, LABEL = 88, 8, 20


def attribution_sheet(
    workspace: Workspace, snapshot: str, samples: Artifact, queries: Artifact, shown_queries: int, shown_samples: int
) -> bytes:
    """Draw a JPEG: a row for each of some queries, spread over the set, with its most influential images."""
    every = load_queries(queries)
    chosen = [every[number] for number in spread(len(every), shown_queries)]
    ranked = read_ranks(workspace, snapshot, [query.query_id for query in chosen])
    ranks = without(ranked, removed_ids(workspace, samples.path)).to_pylist()
    width = (shown_samples + 1) * (TILE + GAP) + 2 * GAP
    sheet = Image.new("RGB", (width, len(chosen) * (TILE + LABEL + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, query in enumerate(chosen):
        top = GAP + row * (TILE + LABEL + GAP)
        pen.text((GAP, top), f"{query.query_id}: {query.caption}"[:110], fill="#2d3748", font=font)
        mine = [(r["rank"], -r["score"], r["train_id"]) for r in ranks if r["query_id"] == query.query_id]
        images, _ = readable_images(samples.path, [train_id for *_, train_id in sorted(mine)[:shown_samples]])
        for column, image in enumerate([query.image, *images]):
            left = GAP + column * (TILE + GAP) + (GAP if column else 0)
            sheet.paste(_tile(image), (left, top + LABEL))
        right = 2 * GAP + TILE
        pen.line((right, top + LABEL, right, top + LABEL + TILE), fill="#a0aec0", width=2)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def spread(items: int, shown: int) -> list[int]:
    """Return the numbers of `shown` of some items, evenly spaced from the first on; all where there are not more."""
    return list(range(0, items, max(1, items // shown)))[:shown]


def _tile(image: Image.Image) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE), "#edf2f7")
    small = image.copy()
    small.thumbnail((TILE, TILE))
    if max(small.size) < TILE:  # tiny training images are shown as large as the others
        scale = TILE / max(small.size)
        small = small.resize((round(small.width * scale), round(small.height * scale)), Image.Resampling.NEAREST)
    tile.paste(small, ((TILE - small.width) // 2, (TILE - small.height) // 2))
    return tile
