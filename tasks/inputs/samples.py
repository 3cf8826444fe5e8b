"""Make `samples.parquet` from the tars, and read the images of samples."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
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
from tasks.inputs.mapped_samples import map_samples, rows_at
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
    key = _index_key(shards)
    samples_path, rejected_path = workspace.samples(key), workspace.rejected_samples(key)
    manifest, rejected = committed(samples_path, key), committed(rejected_path, key)
    reused = manifest is not None and rejected is not None
    if not reused:
        started = time.monotonic()
        samples, rejections = _scanned(shards)
        table = rejection_rows(rejections)
        rejected = commit_table(rejected_path, table, tables.REJECTED_SAMPLES, key=key, started=started)
        manifest = commit_table(samples_path, sample_rows(samples), tables.SAMPLES, key=key, started=started)
    assert manifest is not None and rejected is not None
    if int(manifest.schema_version or 0) < tables.SAMPLES.version:
        tell_of_columns_that_came_later(samples_path)
    write_indexed(workspace, samples_path, rejected_path)
    if rejected.rows:
        rejections = tables.read(rejected_path, tables.REJECTED_SAMPLES)
        warn_of_rejections(rejections, workspace)
        _check_any(manifest.rows, rejections)
    return Made(samples_artifact(samples_path), manifest.seconds, reused)


def look_at_samples(context: Context) -> tuple[Artifact, pa.Table]:
    """Return what `ingest_samples` would make, as an artifact and its table, and write nothing.

    The index is read where it is there, else the tars are.

    Raises:
        UsageError: there is no tar, or no usable sample in them.
    """
    shards = find_shards(context.config.data.shards, "data.shards")
    key = _index_key(shards)
    path = context.workspace.samples(key)
    if committed(path, key) is not None:
        return samples_artifact(path), samples_table(path)
    samples, rejections = _scanned(shards)
    if rejections:
        told = rejection_rows(rejections)
        warn_of_rejections(told)
        _check_any(len(samples), told)
    table = sample_rows(samples)
    return Artifact("samples", _content_key(table), path, table.num_rows), table


def _index_key(shards: list[Path]) -> str:
    return input_key("samples", RULES, stamps(files_behind(shards)), table=tables.SAMPLES)


def _scanned(shards: list[Path]) -> tuple[list[ShardSample], list[Rejection]]:
    with stage("samples", len(shards)) as advance:
        samples, rejections = scan(shards, lambda: advance(1))
    tell_of_several_pictures(samples)
    return samples, rejections


def _check_any(samples: int, rejections: pa.Table) -> None:
    if not samples:
        (first,) = rejections.slice(0, 1).to_pylist()
        raise UsageError(f"data.shards holds no usable sample; the first fault: {describe(Rejection(**first))}")


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


def tell_of_columns_that_came_later(path: AnyPath) -> None:
    """Say what a table of an earlier release lacks, and how to have it: rows and train_ids stay what they are."""
    said = (
        f"{path.parent} was indexed by an earlier release: its samples have no perceptual hash, so that answers fold "
        "copies of the same bytes alone, and no fields of the tars' .json; delete that folder and start this command "
        "again, and the tars are read anew, with the same train_ids"
    )
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def warn_of_rejections(table: pa.Table, workspace: Workspace | None = None) -> None:
    """Print how many samples were rejected, the first few with their reasons, and what lists those of a workspace."""
    query = 'sql "SELECT * FROM rejected_samples"'
    listing = f" (all: {command(workspace, query)})" if workspace else ""
    console.print(f"[yellow]{table.num_rows} skipped[/]{escape(listing)}:", highlight=False, soft_wrap=True)
    for row in table.slice(0, 5).to_pylist():
        console.print("  " + describe(Rejection(**row)), markup=False, highlight=False, soft_wrap=True)


@functools.lru_cache(maxsize=2)
def samples_table(path: AnyPath) -> pa.Table:
    """Read `samples.parquet`, row number = train_id; it may be cached, as its folder is named after its inputs.

    A large one is mapped from a file.
    """
    mapped = map_samples(path)
    return tables.read(path, tables.SAMPLES) if mapped is None else mapped


def sample_images(path: AnyPath, train_ids: list[int]) -> list[Image.Image]:
    """Read the images of some samples, in the order given.

    Raises:
        BadSample: an image cannot be read any more.
    """
    rows = rows_at(samples_table(path).select(["shard", "offset", "size"]), train_ids).to_pylist()
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
    columns = ["shard", "offset", "size", "key", "image_sha256"]
    return rows_at(samples_table(path).select(columns), train_ids).to_pylist()


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
