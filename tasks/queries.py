"""Make the queries: generate one image per caption, or read images that exist."""

from __future__ import annotations

import functools
import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from fastgda_core.diffusion.sampling import generate
from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.commit import (
    commit_table,
    committed,
    file_sha256,
    input_key,
    read_manifest,
    write_atomically,
)
from storage_schemas.files import AnyPath, stamps
from tasks.config import QueriesConfig
from tasks.context import Context, Stage
from tasks.progress import console, stage
from tasks.samples import describe
from tasks.webdataset_shards import decode_image, find_shards, read_image, scan

GENERATION_BATCH = 16


@dataclass(frozen=True)
class Query:
    """A synthesized image with its caption."""

    query_id: str
    split: str
    caption: str
    image: Image.Image

    @property
    def owner(self) -> int:
        """A 48-bit number that stands for the query in noise streams."""
        return int.from_bytes(hashlib.sha256(self.query_id.encode()).digest()[:6], "big")


@task(task_run_name="queries", cache_policy=NO_CACHE)
def make_queries(context: Context) -> Stage:
    """The query set of the config, with its splits, as one table and as PNG files beside it."""
    config = context.config.queries
    # Images that exist depend on no setting of their generation.
    settings = config.model_dump(mode="json", include=None if config.captions else {"split", "seed"})
    key = input_key("queries", settings, stamps(_shards(config)), context.model_hash if config.captions else None)
    path = context.workspace.queries(key)
    manifest = committed(path, key)
    reused = manifest is not None
    if manifest is None:
        started = time.monotonic()
        found = _generate(context) if config.captions else _collect(config)
        splits = config.split.of(len(found)).assign(config.seed)
        rows = []
        for (query_id, caption, png), split in zip(found, splits, strict=True):
            write_atomically(path.parent / "images" / f"{query_id.replace('/', '_')}.png", png)
            digest = hashlib.sha256(png).hexdigest()
            rows.append(
                {"query_id": query_id, "split": split, "caption": caption, "image": png, "image_sha256": digest}
            )
        table = pa.Table.from_pylist(rows, schema=tables.QUERIES.schema)
        manifest = commit_table(path, table, tables.QUERIES, key=key, started=started, device=str(context.device))
    return replace(queries_stage(path), seconds=manifest.seconds, reused=reused)


def queries_stage(path: AnyPath) -> Stage:
    """A committed query set as a stage."""
    manifest = read_manifest(path)
    rows = manifest.rows if manifest else tables.read(path, tables.QUERIES).num_rows
    return Stage("queries", file_sha256(path)[:16], path, rows, 0.0, True)


def _generate(context: Context) -> list[tuple[str, str, bytes]]:
    config = context.config.queries
    captions = config.captions or []
    found = []
    with stage("queries", len(captions)) as advance:
        model = context.model()
        for start in range(0, len(captions), GENERATION_BATCH):
            batch = captions[start : start + GENERATION_BATCH]
            numbers = list(range(start, start + len(batch)))
            latents = generate(
                model, batch, numbers, seed=config.seed, steps=config.steps, guidance_scale=config.guidance_scale
            )
            for number, caption, image in zip(numbers, batch, model.decode_images(latents), strict=True):
                found.append((f"q{number:04d}", caption, _png(image)))
            advance(len(batch))
    return found


def count_queries(config: QueriesConfig) -> int:
    """How many there will be, at most, without making them."""
    if config.captions:
        return len(config.captions)
    samples, _ = scan(_shards(config), lambda: None)
    return config.split.of(len(samples)).total


def _shards(config: QueriesConfig) -> list[Path]:
    if config.shards is None:
        return []
    if "{partition}" in config.shards and not config.partition:
        raise UsageError("queries.shards asks for a {partition}: set queries.partition, or run `fastgda backfill`")
    return find_shards(config.shards.replace("{partition}", config.partition), "queries.shards")


def _collect(config: QueriesConfig) -> list[tuple[str, str, bytes]]:
    shards = _shards(config)
    with stage("queries", len(shards)) as advance:
        samples, rejections = scan(shards, lambda: advance(1))
    for rejection in rejections:
        console.print(f"query skipped: {describe(rejection)}", markup=False, highlight=False)
    return [
        (sample.key, sample.captions[0], _png(read_image(sample.shard, sample.offset, sample.size)))
        for sample in samples
    ]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def join_queries(sets: Sequence[Stage]) -> list[tuple[int, int]]:
    """Number of the set and row in it of every query of some sets; of queries of one name, the last set's."""
    place: dict[str, tuple[int, int]] = {}
    for number, several in enumerate(sets):
        for row, query in enumerate(load_queries(several)):
            place[query.query_id] = number, row
    return sorted(place.values())


def joined_queries(sets: Sequence[Stage]) -> list[Query]:
    """The queries of some sets together, in the order of `join_queries`."""
    loaded = [load_queries(several) for several in sets]
    return [loaded[number][row] for number, row in join_queries(sets)]


@functools.lru_cache(maxsize=64)
def load_queries(stage_: Stage) -> tuple[Query, ...]:
    """The queries of a query set, in order."""
    return tuple(
        Query(row["query_id"], row["split"], row["caption"], decode_image(row["image"]))
        for row in tables.read(stage_.path, tables.QUERIES).to_pylist()
    )
