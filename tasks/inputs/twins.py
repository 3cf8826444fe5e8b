"""Training samples whose place in a ranking is known beforehand: queries are made from them to test the teacher.

The twin of a query is the training sample whose caption it was generated from, or which is the query. A teacher that
does not rank twins first names the wrong images.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from storage_schemas import tables
from storage_schemas.files import AnyPath
from storage_schemas.workspace import twins_beside
from tasks.artifact import Artifact
from tasks.inputs.samples import captions_of, readable_images, samples_table

DRAWS = 8  # samples that are looked at for one that will do


@dataclass(frozen=True)
class Twin:
    """A training sample that queries are made from; no other has its caption unless `shared`."""

    train_id: int
    caption: str
    image: Image.Image
    shared: bool


def draw_twins(samples: Artifact, count: int, seed: int) -> list[Twin]:
    """Draw readable samples spread over the whole set, one out of each of `count` equal stretches.

    A sample whose caption no other one has is preferred: the twin of a generated query must be one sample alone.
    """
    if not count:
        return []
    draw = random.Random(seed)
    edges = [samples.rows * number // count for number in range(count + 1)]
    stretches = [range(start, stop) for start, stop in itertools.pairwise(edges)]
    drawn = [draw.sample(stretch, min(DRAWS, len(stretch))) for stretch in stretches]
    flat = [train_id for several in drawn for train_id in several]
    captions = [several[0] for several in captions_of(samples.path, flat)]
    caption_of = dict(zip(flat, captions, strict=True))
    shared = _shared(samples, captions)
    _, faults = readable_images(samples.path, flat)
    found = []
    for several in drawn:
        readable = [train_id for train_id in several if train_id not in faults]
        for train_id in sorted(readable, key=lambda one: caption_of[one] in shared)[:1]:
            (image,), _ = readable_images(samples.path, [train_id])
            found.append(Twin(train_id, caption_of[train_id], image, caption_of[train_id] in shared))
    return found


def _shared(samples: Artifact, captions: list[str]) -> set[str]:
    """Return those of some captions that several samples have."""
    every = samples_table(samples.path)["captions"]
    wanted = pa.array(sorted(set(captions)), pa.string())
    counts = dict.fromkeys(captions, 0)
    for chunk in every.chunks:  # a sample that says the same twice counts twice, which only makes it less wanted
        words = chunk.flatten()
        for pair in pc.value_counts(words.filter(pc.is_in(words, wanted))).to_pylist():
            counts[pair["values"]] += pair["counts"]
    return {caption for caption, count in counts.items() if count > 1}


def load_twins(queries: AnyPath) -> dict[str, int]:
    """Read the train_id of each query's twin, for queries that have one; `queries` is the file of the query set."""
    path = twins_beside(queries)
    if not path.exists():
        return {}
    table = tables.read(path, tables.TWINS)
    return dict(zip(table["query_id"].to_pylist(), table["train_id"].to_pylist(), strict=True))
