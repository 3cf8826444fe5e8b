"""Make `samples.parquet` from the tars, and read the images of samples."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE
from rich.markup import escape

from fastgda_core.errors import BadSample, UsageError
from fastgda_core.images import in_threads
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit, commit_table, committed, input_key
from storage_schemas.files import AnyPath, stamps
from storage_schemas.indexed_samples import write_indexed
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.context import Context
from tasks.inputs.coco import files_behind
from tasks.inputs.joined_samples import Joined
from tasks.inputs.mapped_samples import map_samples
from tasks.inputs.sample_parts import SampleParts
from tasks.inputs.tars import RULES, Rejection, ShardSample, find_shards, read_image
from tasks.printable import printable
from tasks.progress import console, stage

Ready = TypeVar("Ready")


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
        parts = SampleParts.of(workspace, key, shards)
        parts.make_missing()
        rejected, manifest = _join(parts, samples_path, rejected_path)
    assert manifest is not None and rejected is not None
    if int(manifest.schema_version or 0) < tables.SAMPLES.version:
        tell_of_columns_that_came_later(samples_path)
    write_indexed(workspace, samples_path, rejected_path)
    if rejected.rows:
        rejections = tables.read(rejected_path, tables.REJECTED_SAMPLES)
        warn_of_rejections(rejections, workspace)
        _check_any(manifest.rows, rejections)
    return Made(samples_artifact(samples_path), manifest.seconds, reused)


def missing_samples(context: Context) -> SampleParts | None:
    """Return the parts in which the tars are to be read; None where their index is there.

    Raises:
        UsageError: there is no tar.
    """
    shards = find_shards(context.config.data.shards, "data.shards")
    workspace, key = context.workspace, _index_key(shards)
    if committed(workspace.samples(key), key) and committed(workspace.rejected_samples(key), key):
        return None
    return SampleParts.of(workspace, key, shards)


def _join(parts: SampleParts, samples: AnyPath, rejected: AnyPath) -> tuple[Manifest, Manifest]:
    """Commit the tables of what is rejected and of the samples, from parts that are all there."""
    key, started = parts.artifact.key, time.monotonic() - parts.standing().seconds
    joined = Joined([functools.partial(_columns, parts.path(number)) for number in range(parts.count)])
    tell_of_several_pictures(joined.several_pictures())
    of_rejected = commit_table(rejected, joined.rejected, tables.REJECTED_SAMPLES, key=key, started=started)

    def write(path: Path) -> None:
        tables.SAMPLES.write(path, joined.samples(), {"input_key": key})

    return of_rejected, commit(samples, write, key=key, rows=joined.rows, started=started, table=tables.SAMPLES)


def _columns(path: AnyPath, names: Sequence[str]) -> pa.Table:
    return tables.read(path, tables.SCANNED, columns=names)


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
    parts = SampleParts.of(context.workspace, key, shards)
    there = parts.committed()
    with stage(parts.title, sum(map(parts.rows, range(parts.count)))) as advance:
        read = []
        for number in range(parts.count):
            rows = (
                _columns(parts.path(number), tables.SCANNED.schema.names) if number in there else parts.scanned(number)
            )
            read.append(rows.select)
            advance(parts.rows(number))
    joined = Joined(read)
    tell_of_several_pictures(joined.several_pictures())
    if joined.rejected.num_rows:
        warn_of_rejections(joined.rejected)
        _check_any(joined.rows, joined.rejected)
    table = pa.concat_tables(joined.samples())
    return Artifact("samples", _content_key([table]), path, table.num_rows), table


def _index_key(shards: list[Path]) -> str:
    return input_key("samples", RULES, stamps(files_behind(shards)), table=tables.SAMPLES)


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
    blocks = tables.read_in_blocks(path, tables.SAMPLES, ["key", "captions", "image_sha256"])
    rows = 0

    def counted() -> Iterator[pa.Table]:
        nonlocal rows
        for block in blocks:
            rows += block.num_rows
            yield block

    key = _content_key(counted())
    return Artifact("samples", key, path, rows)


def _content_key(blocks: Iterable[pa.Table]) -> str:
    """Hash what later stages depend on: keys, captions and pixels, in order; not where the tars lie.

    It is the sha256 of a JSON line [key, captions, image_sha256] for each sample, in UTF-8, which no library's format
    can change.
    """
    digest = hashlib.sha256()
    for block in blocks:
        for batch in block.select(["key", "captions", "image_sha256"]).to_batches(max_chunksize=10_000):
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


def tell_of_several_pictures(shards: Iterable[str]) -> None:
    """Say, once a tar, that the first picture of an animation is used; `shards` are the tars of such images."""
    for shard, count in Counter(shards).items():
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


def rows_of_samples(path: AnyPath, train_ids: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Read some columns of some samples, in the order given; of a large table only where these lie in it.

    Raises:
        IndexError: there is no such sample.
    """
    ids = np.asarray(train_ids, np.int64)
    ends = _row_group_ends(path)
    if len(ids) and not 0 <= ids.min() <= ids.max() < ends[-1]:
        raise IndexError(f"{path} has {ends[-1]:,} samples, and {ids.min()} to {ids.max()} are asked for")
    group_of = np.searchsorted(ends, ids, side="right")
    groups, place = np.unique(group_of, return_inverse=True)
    read = [_row_group(path, number, tuple(columns)) for number in groups.tolist()]
    firsts = np.concatenate([[0], ends])[groups]
    within = np.cumsum([0, *(each.num_rows for each in read)])[:-1]
    together = pa.concat_tables(read) if read else tables.SAMPLES.schema.empty_table().select(columns)
    return together.take(pa.array(ids - firsts[place] + within[place] if read else ids))


@functools.lru_cache(maxsize=16)
def _row_group_ends(path: AnyPath) -> NDArray[np.int64]:
    """Return before which train_id each row group ends."""
    return np.cumsum(tables.row_group_sizes(path), dtype=np.int64)


@functools.lru_cache(maxsize=8)  # two kinds of columns of some neighbours: 20 MB each
def _row_group(path: AnyPath, number: int, columns: tuple[str, ...]) -> pa.Table:
    return tables.read_row_group(path, tables.SAMPLES, number, columns)


def captions_of(path: AnyPath, train_ids: Sequence[int]) -> list[list[str]]:
    """Return the captions of some samples, in the order given."""
    captions: list[list[str]] = rows_of_samples(path, train_ids, ["captions"])["captions"].to_pylist()
    return captions


def caption_counts(path: AnyPath) -> Iterator[pa.ChunkedArray]:
    """Yield how many captions samples have, block by block."""
    for block in tables.read_in_blocks(path, tables.SAMPLES, ["captions"]):
        yield pc.list_value_length(block["captions"])


def sample_images(path: AnyPath, train_ids: list[int]) -> list[Image.Image]:
    """Read the images of some samples, in the order given.

    Raises:
        BadSample: an image cannot be read any more.
    """
    rows = rows_of_samples(path, train_ids, ["shard", "offset", "size"]).to_pylist()
    return [read_image(**row) for row in rows]


def readable_images(path: AnyPath, train_ids: list[int]) -> tuple[list[Image.Image], dict[int, str]]:
    """Read the images of some samples; one that changed since its tar was indexed is grey, and the reason is given."""
    return _parted(train_ids, map(_read_or_grey, _places(path, train_ids)))


def readable_images_ahead(
    path: AnyPath, train_ids: list[int], size: int
) -> Iterator[tuple[list[Image.Image], dict[int, str]]]:
    """Yield `readable_images` of consecutive batches, which threads decode ahead."""
    return ready_images_ahead(path, train_ids, size, lambda image: image)


def ready_images_ahead(
    path: AnyPath, train_ids: list[int], size: int, prepare: Callable[[Image.Image], Ready]
) -> Iterator[tuple[list[Ready], dict[int, str]]]:
    """Yield what `prepare` makes of `readable_images`, in consecutive batches; threads decode and prepare ahead."""

    def ready(row: dict[str, Any]) -> tuple[Ready, str]:
        image, why = _read_or_grey(row)
        return prepare(image), why

    for number, batch in enumerate(in_threads(ready, _places(path, train_ids), size)):
        yield _parted(train_ids[size * number : size * (number + 1)], batch)


def _places(path: AnyPath, train_ids: list[int]) -> list[dict[str, Any]]:
    return rows_of_samples(path, train_ids, ["shard", "offset", "size", "key", "image_sha256"]).to_pylist()


def _read_or_grey(row: dict[str, Any]) -> tuple[Image.Image, str]:
    """Return an image and what is wrong with it; the latter is empty where nothing is."""
    try:
        return read_image(row["shard"], row["offset"], row["size"], row["image_sha256"]), ""
    except BadSample as error:
        return Image.new("RGB", (64, 64), "gray"), f"{row['shard']}/{row['key']}: {error}"


def _parted(train_ids: list[int], read: Iterable[tuple[Ready, str]]) -> tuple[list[Ready], dict[int, str]]:
    images: list[Ready] = []
    faults: dict[int, str] = {}
    for train_id, (image, why) in zip(train_ids, read, strict=True):
        images.append(image)
        faults |= {train_id: why} if why else {}
    return images, faults
