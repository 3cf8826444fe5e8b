"""Draw where in a generated picture the influence of training images lies, by the nda teacher: docs/images/nda.png.

Each row is a query, then the samples with the largest scores. Below a sample stands the query, as it is
where the sample's share at a patch is the largest of the row, and dark where it has none; under it is its score.

Takes the workspace of a finished run; the parts of the nda teacher that it lacks are made there.

Run: python benchmarks/nda_heat_maps.py CONFIG docs/images/nda.png
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tasks.artifact import Artifact
from tasks.config.files import load_config
from tasks.config.teaching import TeacherConfig
from tasks.context import Context, open_context
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples, readable_images_ahead
from tasks.teaching.nda import FAMILY, POSTERIOR_PART, query_heat_maps

PICTURED = (3, 14, 15, 44, 45)  # queries, of two parts
# Half of the demo's resolution: as many places as there are in the judge's world. One scale, else as published.
TEACHER = TeacherConfig(name="nda", patch_pixels=16, patch_sizes=(7,))
SHOWN, TILE, GAP, LABEL = 6, 80, 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    context = open_context(load_config(arguments.config).model_copy(update={"teacher": TEACHER}))
    samples = ingest_samples.fn(context).artifact
    queries = make_queries.fn(context, samples).artifact
    artifacts = {each.name: each for each in (samples, queries, *FAMILY.artifacts(context, samples, queries))}
    pictures, posteriors = FAMILY.parts(context, artifacts)
    for number in pictures.missing():
        pictures.make(number)
    for number in {query // POSTERIOR_PART for query in PICTURED} & set(posteriors.missing()):
        posteriors.make(number)
    draw(context, artifacts, arguments.picture)


def draw(context: Context, artifacts: dict[str, Artifact], path: Path) -> None:
    """Save the picture: a band of two rows of tiles for each query."""
    several, everyone = load_queries(artifacts["queries"]), np.arange(artifacts["samples"].rows)
    scores = FAMILY.scores(context, artifacts, list(PICTURED), everyone).scores
    step, band = TILE + GAP, 2 * TILE + LABEL + 2 * GAP
    sheet = Image.new("RGB", (2 * GAP + (SHOWN + 1) * step, GAP + len(PICTURED) * band), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, number in enumerate(PICTURED):
        query, top = several[number], GAP + place * band
        best = scores[place].topk(SHOWN).indices.sort().values.numpy()
        images = next(iter(readable_images_ahead(artifacts["samples"].path, best.tolist(), SHOWN)))[0]
        maps = query_heat_maps(context, artifacts, [number], best)[0]
        asked = query.image.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(asked, (GAP, top))
        pen.multiline_text((GAP, top + TILE + GAP), textwrap.fill(query.caption, 14), fill="#4a5568", font=font)
        for column, which in enumerate(scores[place, best].argsort(descending=True).tolist()):
            left = 2 * GAP + (column + 1) * step
            sheet.paste(images[which].convert("RGB").resize((TILE, TILE)), (left, top))
            sheet.paste(lit(asked, maps[which] / maps.max()), (left, top + TILE))
            share = f"{float(scores[place, best[which]]):.1%}"
            pen.text((left + TILE - pen.textlength(share, font), top + 2 * TILE + GAP // 2), share, "#4a5568", font)
    sheet.save(path, optimize=True)


def lit(picture: Image.Image, shares: Tensor) -> Image.Image:
    """Return a picture that is as it is where the share is 1, and dark blue where it is 0."""
    mask = Image.fromarray((shares.sqrt() * 255).to(torch.uint8).numpy()).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, "#1a2a6c"), 0.85), mask)


if __name__ == "__main__":
    main()
