"""Make the queries: generate one image per caption, or read images that exist."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.sampling import can_generate, generate
from fastgda_core.errors import UsageError
from fastgda_core.images import decode_image
from fastgda_core.interruption import checkpoint
from storage_schemas import tables
from storage_schemas.commit import (
    Manifest,
    commit_table,
    file_sha256,
    input_key,
    read_manifest,
    write_atomically,
)
from storage_schemas.files import AnyPath, stamps
from storage_schemas.workspace import twins_beside
from tasks.artifact import Artifact, Made, once
from tasks.config.inputs import QueriesConfig
from tasks.context import Context
from tasks.inputs.samples import describe, tell_of_several_pictures
from tasks.inputs.tars import RULES, find_shards, read_image, scan
from tasks.inputs.twins import draw_twins, load_twins
from tasks.progress import console, stage

GENERATION_BATCH = 16
_PLAIN_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
_READING = threading.Lock()  # threads that ask for images at once read a query set once
TWIN_NUMBERS = 2**32  # + train_id: the starting noise of a twin's query, apart from those of captions


@dataclass(frozen=True)
class Query:
    """A synthesized image with its caption."""

    query_id: str
    split: str
    caption: str
    path: AnyPath
    """The table of its query set."""
    row: int

    @property
    def encoded(self) -> bytes:
        """The image as its PNG."""
        with _READING:
            content: bytes = _encoded_images(self.path)[self.row].as_py()
        return content

    @property
    def image(self) -> Image.Image:
        """The image, decoded anew each time: thousands of images are more than there is memory for."""
        return decode_image(self.encoded)

    @property
    def owner(self) -> int:
        """A 48-bit number that stands for the query in noise streams."""
        return int.from_bytes(hashlib.sha256(self.query_id.encode()).digest()[:6], "big")


Row = tuple[str, str, str, bytes]  # query_id, split, caption, PNG


@task(task_run_name="queries", cache_policy=NO_CACHE)
def make_queries(context: Context, samples: Artifact) -> Made:
    """Make the config's query set, with its splits and the twin test's queries, as one table and as PNG files."""
    config = context.config.queries
    # Queries that are read and not generated depend on no setting of generation.
    settings = config.model_dump(mode="json", include=None if _generates(config) else {"split", "seed", "twins"})
    model_hash = context.model_hash if _generates(config) else None
    twins_of = samples.key if config.twins else None
    tars = [RULES, *stamps(_shards(config))] if config.shards else []
    key = input_key("queries", settings, tars, model_hash, twins_of, table=tables.QUERIES)
    path = context.workspace.queries(key)

    def make(started: float) -> Manifest:
        asked = _generate(context) if config.captions else _collect(config)
        splits = config.split.of(len(asked)).assign(config.seed)
        rows = [(query_id, split, caption, png) for (query_id, caption, png), split in zip(asked, splits, strict=True)]
        twins, of_twins = _twin_queries(context, samples, key)
        table = pa.Table.from_pylist(
            [query_row(path, number, *row) for number, row in enumerate((*rows, *of_twins))],
            schema=tables.QUERIES.schema,
        )
        commit_table(twins_beside(path), twins, tables.TWINS, key=key, started=started)
        return commit_table(path, table, tables.QUERIES, key=key, started=started, device=str(context.device))

    made = once(Artifact("queries", key, path, 0), path, make)
    return replace(made, artifact=queries_artifact(path))


def _generates(config: QueriesConfig) -> bool:
    return bool(config.captions or config.twins)


def query_row(path: AnyPath, number: int, query_id: str, split: str, caption: str, png: bytes) -> dict[str, object]:
    """Write a query's PNG beside the table, and return the query's row.

    The file is named after the query where the name is fit for a file, else numbered.
    """
    stem = query_id
    if not _PLAIN_NAME.fullmatch(query_id):
        stem = f"{number:05d}-{hashlib.sha256(query_id.encode()).hexdigest()[:12]}"
    write_atomically(path.parent / "images" / f"{stem}.png", png)
    digest = hashlib.sha256(png).hexdigest()
    return {"query_id": query_id, "split": split, "caption": caption, "image": png, "image_sha256": digest}


def queries_artifact(path: AnyPath) -> Artifact:
    """Return the artifact of a committed query set."""
    manifest = read_manifest(path)
    rows = manifest.rows if manifest else tables.read(path, tables.QUERIES).num_rows
    return Artifact("queries", file_sha256(path)[:16], path, rows)


def _generate(context: Context) -> list[tuple[str, str, bytes]]:
    captions = context.config.queries.captions or []
    images = _images_of(context, "queries", captions, range(len(captions)))
    names = [f"q{number:04d}" for number in range(len(captions))]
    return list(zip(names, captions, images, strict=True))


def _images_of(context: Context, name: str, captions: list[str], numbers: Sequence[int]) -> list[bytes]:
    """Generate a PNG from each caption; its starting noise depends on its number alone."""
    images: list[bytes] = []
    with stage(name, len(captions)) as advance:
        for batch in _generated(context.model(), context.config.queries, captions, numbers):
            images += batch
            advance(len(batch))
    return images


def _generated(
    model: DiffusionModel, config: QueriesConfig, captions: Sequence[str], numbers: Sequence[int]
) -> Iterator[list[bytes]]:
    """Yield PNGs in batches, by the sampler of the configuration."""
    for start in range(0, len(captions), GENERATION_BATCH):
        checkpoint()
        batch = slice(start, start + GENERATION_BATCH)
        latents = generate(
            model,
            list(captions[batch]),
            list(numbers[batch]),
            seed=config.seed,
            steps=config.steps,
            guidance_scale=config.guidance_scale,
        )
        yield [_png(image) for image in model.decode_images(latents)]


def draw_again(model: DiffusionModel, config: QueriesConfig, several: Sequence[Query]) -> list[bytes]:
    """Generate the PNGs of queries of `config.captions` by another model, from the starting noise that each had."""
    captions, numbers = [query.caption for query in several], [query.row for query in several]
    return [png for batch in _generated(model, config, captions, numbers) for png in batch]


def starting_number(query: Query) -> int | None:
    """Return the number of the noise that a query of `queries.captions` began with; None: a training image had none."""
    if query.split == tables.PSEUDO:
        return None
    return TWIN_NUMBERS + load_twins(query.path)[query.query_id] if query.split == tables.TWIN else query.row


def _twin_queries(context: Context, samples: Artifact, key: str) -> tuple[pa.Table, list[Row]]:
    """Make the queries of the twin test, generated ones and then training images, and the table of their twins.

    An id holds a part of the set's key: twins of several sets may stand in one snapshot.
    """
    config = context.config.queries
    twins = draw_twins(samples, config.twins, config.seed)
    alone = [twin for twin in twins if not twin.shared]
    if twins and not alone:
        console.print("twin test: captions are shared by several samples, so only training images are asked")
    if alone and not can_generate(context.model()):
        console.print("twin test: the model is sampled by a pipeline of its own, so only training images are asked")
        alone = []
    images = _images_of(
        context, "twins", [twin.caption for twin in alone], [TWIN_NUMBERS + twin.train_id for twin in alone]
    )
    found = [(tables.TWIN, twin, png) for twin, png in zip(alone, images, strict=True)]
    found += [(tables.PSEUDO, twin, _png(twin.image)) for twin in twins]
    rows = [(f"{kind}-{twin.train_id}-{key[:6]}", kind, twin.caption, png) for kind, twin, png in found]
    train_ids = [twin.train_id for _, twin, _ in found]
    return tables.TWINS.rows(query_id=[row[0] for row in rows], train_id=train_ids), rows


def count_queries(config: QueriesConfig) -> int:
    """Count the queries that there will be, at most, without making them."""
    if config.captions:
        return len(config.captions) + 2 * config.twins
    samples, _ = scan(_shards(config), lambda: None)
    return config.split.of(len(samples)).total + 2 * config.twins


def _shards(config: QueriesConfig) -> list[Path]:
    if config.shards is None:
        return []
    if "{partition}" in config.shards and not config.partition:
        raise UsageError("queries.shards asks for a {partition}: set queries.partition, or run `fastgda backfill`")
    return find_shards(config.pattern, "queries.shards")


def _collect(config: QueriesConfig) -> list[tuple[str, str, bytes]]:
    shards = _shards(config)
    with stage("queries", len(shards)) as advance:
        samples, rejections = scan(shards, lambda: advance(1))
    tell_of_several_pictures(each.shard for each in samples if each.pictures > 1)
    for rejection in rejections:
        console.print(f"query skipped: {describe(rejection)}", markup=False, highlight=False, soft_wrap=True)
    return [
        (sample.key, sample.captions[0], _png(read_image(sample.shard, sample.offset, sample.size)))
        for sample in samples
    ]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def join_queries(sets: Sequence[Artifact]) -> list[tuple[int, int]]:
    """Return each query's set and row in it, of some sets together; of queries of one name, the last set's."""
    place: dict[str, tuple[int, int]] = {}
    for number, several in enumerate(sets):
        for row, query in enumerate(load_queries(several)):
            place[query.query_id] = number, row
    return sorted(place.values())


def joined_queries(sets: Sequence[Artifact]) -> list[Query]:
    """Return the queries of some sets together, in the order of `join_queries`."""
    loaded = [load_queries(several) for several in sets]
    return [loaded[number][row] for number, row in join_queries(sets)]


def load_queries(queries: Artifact) -> tuple[Query, ...]:
    """Load the queries of a query set, in order; their images are read when one is asked for."""
    return _queries_in(queries.path)


@functools.lru_cache(maxsize=64)
def _queries_in(path: AnyPath) -> tuple[Query, ...]:
    rows = tables.read(path, tables.QUERIES, columns=["query_id", "split", "caption"]).to_pylist()
    return tuple(Query(**row, path=path, row=number) for number, row in enumerate(rows))


@functools.lru_cache(maxsize=2)
def _encoded_images(path: AnyPath) -> pa.ChunkedArray:
    return tables.read(path, tables.QUERIES, columns=["image"])["image"]
