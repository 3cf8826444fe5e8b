"""Make `samples.parquet` from the tars, and the latents and text embeddings of what gets scored."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image, ImageOps
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_file, save_file

from fastgda_core.diffusion.loss import concatenate
from fastgda_core.errors import UsageError
from fastgda_core.teachers.training_loss import SampleBlock
from storage_schemas import tables
from storage_schemas.commit import commit, commit_table, committed, input_key
from storage_schemas.workspace import part
from tasks.context import Context, Stage, stage_of_parts
from tasks.progress import console, stage
from tasks.webdataset_shards import Rejection, find_shards, read_image, scan

LATENT_PART_SAMPLES = 512
_CONDITION = "condition/"


@task(task_run_name="samples", cache_policy=NO_CACHE)
def ingest_samples(context: Context) -> Stage:
    """Index and check every sample of the tars; a tar that changed since is read again."""
    workspace = context.workspace
    shards = find_shards(context.config.data.shards, "data.shards")
    key = input_key("samples", [(str(shard), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards])
    samples_path, rejected_path = workspace.samples(key), workspace.rejected_samples(key)
    manifest, rejected = committed(samples_path, key), committed(rejected_path, key)
    reused = manifest is not None and rejected is not None
    if not reused:
        started = time.monotonic()
        with stage("samples", len(shards)) as advance:
            samples, rejections = scan(shards, lambda: advance(1))
        if not samples:
            raise UsageError(f"data.shards holds no usable sample; the first fault: {describe(rejections[0])}")
        rows = [{"train_id": number, **asdict(sample)} for number, sample in enumerate(samples)]
        rejected = commit_table(
            rejected_path,
            pa.Table.from_pylist([asdict(item) for item in rejections], schema=tables.REJECTED_SAMPLES.schema),
            tables.REJECTED_SAMPLES,
            key=key,
            started=started,
        )
        manifest = commit_table(
            samples_path,
            pa.Table.from_pylist(rows, schema=tables.SAMPLES.schema),
            tables.SAMPLES,
            key=key,
            started=started,
        )
    assert manifest is not None and rejected is not None
    if rejected.rows:
        warn_of_rejections(tables.read(rejected_path, tables.REJECTED_SAMPLES))
    return Stage(
        "samples", _content_key(samples_table(samples_path)), samples_path, manifest.rows, manifest.seconds, reused
    )


def _content_key(samples: pa.Table) -> str:
    """What later stages depend on: keys, captions and pixels, in order; not where the tars lie."""
    digest = hashlib.sha256()
    for name in ("key", "captions", "image_sha256"):
        for batch in samples.select([name]).combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:16]


def describe(rejection: Rejection) -> str:
    return f"{rejection.shard}{'/' + rejection.key if rejection.key else ''}: {rejection.reason}"


def warn_of_rejections(table: pa.Table) -> None:
    console.print(
        f'[yellow]{table.num_rows} skipped[/] (all: fastgda sql "SELECT * FROM rejected_samples"):', highlight=False
    )
    for row in table.slice(0, 5).to_pylist():
        console.print("  " + describe(Rejection(**row)), markup=False, highlight=False)


@functools.lru_cache(maxsize=2)
def samples_table(path: Path) -> pa.Table:
    """`samples.parquet`, row number = train_id; its folder is named after its inputs, so it may be kept."""
    return tables.read(path, tables.SAMPLES)


def sample_images(path: Path, train_ids: list[int]) -> list[Image.Image]:
    rows = samples_table(path).select(["shard", "offset", "size"]).take(train_ids).to_pylist()
    return [read_image(**row) for row in rows]


@task(task_run_name="latents", cache_policy=NO_CACHE)
def encode_latents(context: Context, samples: Stage) -> Stage:
    """Latents and caption embeddings of every sample, in parts of 512."""
    key = input_key("latents", samples.key, context.model_hash, context.config.model.flips)
    folder = context.workspace.latents(key)
    starts = range(0, samples.rows, LATENT_PART_SAMPLES)
    paths = [part(folder, number, "safetensors") for number in range(len(starts))]
    sizes = [min(LATENT_PART_SAMPLES, samples.rows - start) for start in starts]
    missing = [number for number, path in enumerate(paths) if committed(path, key) is None]
    with stage("latents", sum(sizes[number] for number in missing)) as advance:
        for number in missing:
            started = time.monotonic()
            train_ids = list(range(starts[number], starts[number] + sizes[number]))
            tensors = _encode_part(context, samples.path, train_ids, advance)
            commit(
                paths[number],
                functools.partial(save_file, tensors),
                key=key,
                rows=sizes[number],
                started=started,
                device=str(context.device),
            )
    return stage_of_parts("latents", key, folder, paths, samples.rows, reused=not missing)


def _encode_part(
    context: Context, samples_path: Path, train_ids: list[int], advance: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    model = context.model()
    captions = samples_table(samples_path)["captions"].take(train_ids).to_pylist()
    flat = [caption for several in captions for caption in several]
    conditions, latents = [], []
    for start in range(0, len(flat), 128):
        conditions.append(model.encode_captions(flat[start : start + 128]))
    for start in range(0, len(train_ids), 64):
        images = sample_images(samples_path, train_ids[start : start + 64])
        seen = [images, [ImageOps.mirror(image) for image in images]] if context.config.model.flips else [images]
        latents.append(torch.stack([model.encode_images(several) for several in seen], dim=1).cpu())
        advance(len(images))
    counts = torch.tensor([len(several) for several in captions])
    tensors = {"train_ids": torch.tensor(train_ids), "latents": torch.cat(latents), "captions_of": counts}
    condition = {f"{_CONDITION}{name}": tensor.cpu() for name, tensor in concatenate(conditions).items()}
    return {name: tensor.contiguous() for name, tensor in {**tensors, **condition}.items()}


def load_block(context: Context, latents: Stage, train_ids: list[int]) -> SampleBlock:
    """The named samples, ascending, on the context's device."""
    by_part: dict[int, list[int]] = {}
    for train_id in train_ids:
        by_part.setdefault(train_id // LATENT_PART_SAMPLES, []).append(train_id % LATENT_PART_SAMPLES)
    pieces: dict[str, list[torch.Tensor]] = {}
    for number, rows in by_part.items():
        tensors = load_file(part(latents.path, number, "safetensors"))
        chosen = torch.tensor(rows)
        first = torch.cumsum(tensors["captions_of"], 0) - tensors["captions_of"]
        caption_rows = torch.cat([torch.arange(first[row], first[row] + tensors["captions_of"][row]) for row in rows])
        for name, tensor in tensors.items():
            pieces.setdefault(name, []).append(tensor[caption_rows if name.startswith(_CONDITION) else chosen])
    whole = {name: torch.cat(several) for name, several in pieces.items()}
    counts = whole["captions_of"]
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number_within = torch.arange(len(owner)) - (torch.cumsum(counts, 0) - counts)[owner]
    device = context.device
    condition = {
        name.removeprefix(_CONDITION): tensor.to(device)
        for name, tensor in whole.items()
        if name.startswith(_CONDITION)
    }
    return SampleBlock(
        whole["train_ids"].to(device),
        whole["latents"].to(device),
        condition,
        owner.to(device),
        number_within.to(device),
    )
