"""Make `samples.parquet` from the tars, and read the images of samples."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE
from rich.markup import escape

from fastgda_core.errors import BadSample, UsageError
from fastgda_core.images import in_threads
from storage_schemas import tables
from storage_schemas.commit import commit_table, committed, input_key
from storage_schemas.files import AnyPath, stamps
from storage_schemas.indexed_samples import write_indexed
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.context import Context
from tasks.inputs.coco import files_behind
from tasks.inputs.tars import RULES, Rejection, ShardSample, find_shards, read_image, scan
from tasks.printable import printable
from tasks.progress import console, stage


@task(task_run_name="samples", cache_policy=NO_CACHE)
def ingest_samples(context: Context) -> Made:
    """Index and check every sample of the tars; a tar that changed since is read again.

    Raises:
        UsageError: there is no tar, or no usable sample in them.
    """
    workspace = context.workspace
    shards = find_shards(context.config.data.shards, "data.shards")
    key = input_key("samples", RULES, stamps(files_behind(shards)), table=tables.SAMPLES)
    samples_path, rejected_path = workspace.samples(key), workspace.rejected_samples(key)
    manifest, rejected = committed(samples_path, key), committed(rejected_path, key)
    reused = manifest is not None and rejected is not None
    if not reused:
        started = time.monotonic()
        with stage("samples", len(shards)) as advance:
            samples, rejections = scan(shards, lambda: advance(1))
        tell_of_several_pictures(samples)
        table = rejection_rows(rejections)
        rejected = commit_table(rejected_path, table, tables.REJECTED_SAMPLES, key=key, started=started)
        manifest = commit_table(samples_path, sample_rows(samples), tables.SAMPLES, key=key, started=started)
    assert manifest is not None and rejected is not None
    write_indexed(workspace, samples_path, rejected_path)
    if rejected.rows:
        rejections = tables.read(rejected_path, tables.REJECTED_SAMPLES)
        warn_of_rejections(workspace, rejections)
        if not manifest.rows:
            (first,) = rejections.slice(0, 1).to_pylist()
            raise UsageError(f"data.shards holds no usable sample; the first fault: {describe(Rejection(**first))}")
    return Made(samples_artifact(samples_path), manifest.seconds, reused)


def sample_rows(samples: Sequence[ShardSample], first: int = 0) -> pa.Table:
    """Return the rows of `tables.SAMPLES`, whose train_ids begin with `first`."""
    rows = [{"train_id": first + number, **asdict(sample)} for number, sample in enumerate(samples)]
    return pa.Table.from_pylist(rows, schema=tables.SAMPLES.schema)


def rejection_rows(rejections: Sequence[Rejection]) -> pa.Table:
    """Return the rows of `tables.REJECTED_SAMPLES`."""
    return pa.Table.from_pylist([asdict(item) for item in rejections], schema=tables.REJECTED_SAMPLES.schema)


def samples_artifact(path: AnyPath) -> Artifact:
    """Return the artifact of a committed table of samples."""
    table = samples_table(path)
    return Artifact("samples", _content_key(table), path, table.num_rows)


def _content_key(samples: pa.Table) -> str:
    """Hash what later stages depend on: keys, captions and pixels, in order; not where the tars lie.

    It is the sha256 of a JSON line [key, captions, image_sha256] for each sample, in UTF-8, which no library's format
    can change.
    """
    digest = hashlib.sha256()
    for batch in samples.select(["key", "captions", "image_sha256"]).to_batches(max_chunksize=10_000):
        digest.update("".join(_json_lines(batch).to_pylist()).encode())
    return digest.hexdigest()[:16]


def _json_lines(batch: pa.RecordBatch) -> pa.Array:
    """Return each row as `json.dumps` writes it, all rows at once: 1.5 s a million, where `json.dumps` takes 5 s."""
    key, captions, image = batch.columns
    offsets = pc.subtract(captions.offsets, captions.offsets[0])
    captions = pc.binary_join(pa.ListArray.from_arrays(offsets, _json_texts(captions.flatten())), ", ")
    return pc.binary_join_element_wise("[", _json_texts(key), ", [", captions, "], ", _json_texts(image), "]\n", "")


def _json_texts(texts: pa.Array) -> pa.Array:
    """Return each text in quotes, those with something to escape by `json.dumps`."""
    quoted = pc.binary_join_element_wise('"', texts, '"', "")
    awkward = pc.match_substring_regex(texts, r'["\\\x00-\x1f]')
    escaped = [json.dumps(text, ensure_ascii=False) for text in texts.filter(awkward).to_pylist()]
    return pc.replace_with_mask(quoted, awkward, pa.array(escaped, pa.string()))


def describe(rejection: Rejection) -> str:
    """Describe a rejection in one line for a terminal."""
    return printable(f"{rejection.shard}{'/' + rejection.key if rejection.key else ''}: {rejection.reason}")


def tell_of_several_pictures(samples: list[ShardSample]) -> None:
    """Say, once a tar, that the first picture of an animation is used."""
    for shard, count in Counter(sample.shard for sample in samples if sample.pictures > 1).items():
        said = f"{shard}: the first picture is used of {count} images that are animations or hold several"
        console.print(said, markup=False, highlight=False, soft_wrap=True)


def warn_of_rejections(workspace: Workspace, table: pa.Table) -> None:
    """Print how many samples were rejected, and the first few with their reasons."""
    listing = command(workspace, 'sql "SELECT * FROM rejected_samples"')
    console.print(f"[yellow]{table.num_rows} skipped[/] (all: {escape(listing)}):", highlight=False, soft_wrap=True)
    for row in table.slice(0, 5).to_pylist():
        console.print("  " + describe(Rejection(**row)), markup=False, highlight=False, soft_wrap=True)


@functools.lru_cache(maxsize=2)
def samples_table(path: AnyPath) -> pa.Table:
    """Read `samples.parquet`, row number = train_id; it may be cached, as its folder is named after its inputs."""
    return tables.read(path, tables.SAMPLES)


def sample_images(path: AnyPath, train_ids: list[int]) -> list[Image.Image]:
    """Read the images of some samples, in the order given.

    Raises:
        BadSample: an image cannot be read any more.
    """
    rows = samples_table(path).select(["shard", "offset", "size"]).take(train_ids).to_pylist()
    return [read_image(**row) for row in rows]


def readable_images(path: AnyPath, train_ids: list[int]) -> tuple[list[Image.Image], dict[int, str]]:
    """Read the images of some samples; one that changed since its tar was indexed is grey, and the reason is given."""
    return _parted(train_ids, map(_read_or_grey, _places(path, train_ids)))


def readable_images_ahead(
    path: AnyPath, train_ids: list[int], size: int
) -> Iterator[tuple[list[Image.Image], dict[int, str]]]:
    """Yield `readable_images` of consecutive batches, which threads decode ahead."""
    for number, batch in enumerate(in_threads(_read_or_grey, _places(path, train_ids), size)):
        yield _parted(train_ids[size * number : size * (number + 1)], batch)


def _places(path: AnyPath, train_ids: list[int]) -> list[dict[str, Any]]:
    return samples_table(path).select(["shard", "offset", "size", "key", "image_sha256"]).take(train_ids).to_pylist()


def _read_or_grey(row: dict[str, Any]) -> tuple[Image.Image, str]:
    """Return an image and what is wrong with it; the latter is empty where nothing is."""
    try:
        return read_image(row["shard"], row["offset"], row["size"], row["image_sha256"]), ""
    except BadSample as error:
        return Image.new("RGB", (64, 64), "gray"), f"{row['shard']}/{row['key']}: {error}"


def _parted(train_ids: list[int], read: Iterable[tuple[Image.Image, str]]) -> tuple[list[Image.Image], dict[int, str]]:
    images: list[Image.Image] = []
    faults: dict[int, str] = {}
    for train_id, (image, why) in zip(train_ids, read, strict=True):
        images.append(image)
        faults |= {train_id: why} if why else {}
    return images, faults
