"""What reading a few training samples of many takes: bytes, reads and CPU seconds; Markdown.

    python -m benchmarks.latents [--samples 1000000] [--chosen 20000] [--stored 100000]
    python -m benchmarks.latents --config CONFIG

Parts of made-up samples lie on a disk, their latents as holes of sparse files, and, as many as `--stored`, in a real S3
API on loopback. Samples are drawn evenly, so that those chosen lie as far apart as they can. Bytes and reads are those
that the kernel counts for this process, and those that the server sends.

CONFIG is of a workspace with one finished run of an unlearning teacher: what captions take of a score shard.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from storage_schemas.files import AnyPath
from storage_schemas.runs.ledger import run_names
from storage_schemas.workspace import Workspace, part
from tasks.config.files import load_config
from tasks.config.pipeline import PipelineConfig
from tasks.inputs.samples import samples_table
from tasks.teaching.families import family_of
from tasks.teaching.latent_rows import LATENT_PART_SAMPLES, part_tensors, read_latent_rows
from tasks.teaching.run import read_run_anew
from tasks.teaching.sketches import SketchParts

BLOCK = 1024  # samples at a time, as teachers read them


@dataclass(frozen=True)
class Model:
    """What a sample of a model is: shape and type of its latents, captions, numbers of an embedded one."""

    title: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    captions: int
    condition: int

    @property
    def latent_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def captions_of(self, sample: int) -> list[str]:
        return [f"a made-up caption, number {number} of the sample {sample:9}" for number in range(self.captions)]


MODELS = (
    Model("MSCOCO's model, flips, five captions", (2, 4, 16, 16), torch.float32, 5, 77 * 1024),
    Model("the same, bf16", (2, 4, 16, 16), torch.bfloat16, 5, 77 * 1024),
    Model("Stable Diffusion 1.4", (1, 4, 64, 64), torch.float32, 1, 77 * 768),
    Model("the same, bf16", (1, 4, 64, 64), torch.bfloat16, 1, 77 * 768),
)


@dataclass
class Taken:
    """What a stretch of work took."""

    bytes: int = 0
    reads: int = 0
    seconds: float = 0.0


@contextmanager
def on_disk() -> Iterator[Taken]:
    taken, (read, calls), started = Taken(), _counted(), time.process_time()
    yield taken
    after = _counted()
    taken.bytes, taken.reads, taken.seconds = after[0] - read, after[1] - calls, time.process_time() - started


def _counted() -> tuple[int, int]:
    lines = Path("/proc/self/io").read_text().split()
    return int(lines[1]), int(lines[5])


@contextmanager
def in_store() -> Iterator[Taken]:
    from tests.object_store import bytes_sent, requests_counted

    taken = Taken()
    with bytes_sent() as sent, requests_counted() as asked:
        yield taken
    taken.bytes, taken.reads = sent["GET"], asked["GET"]


def write_sparse(folder: Path, model: Model, samples: int) -> None:
    """Write parts whose latents, which lie before the captions, are a hole."""
    for number, rows in _parts(samples):
        content = _part(model, rows, torch.empty(0, *model.shape, dtype=model.dtype))
        data = 8 + int.from_bytes(content[:8], "little")
        told, hole = json.loads(content[8:data]), len(rows) * model.latent_bytes
        start, stop = told["captions"]["data_offsets"]
        told["latents"].update(shape=[len(rows), *model.shape], data_offsets=[start, start + hole])
        told["captions"]["data_offsets"] = [start + hole, stop + hole]
        header = json.dumps(told).encode()
        header += b" " * (-len(header) % 8)
        with part(folder, number, "safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + content[data : data + start])
            file.seek(hole, os.SEEK_CUR)
            file.write(content[data + start :])


def write_objects(folder: AnyPath, model: Model, samples: int) -> None:
    for number, rows in _parts(samples):
        latents = torch.zeros(len(rows), *model.shape, dtype=model.dtype)
        part(folder, number, "safetensors").write_bytes(_part(model, rows, latents))


def _parts(samples: int) -> Iterator[tuple[int, list[int]]]:
    for number, first in enumerate(range(0, samples, LATENT_PART_SAMPLES)):
        yield number, list(range(first, min(first + LATENT_PART_SAMPLES, samples)))


def _part(model: Model, rows: list[int], latents: Tensor) -> bytes:
    return save(part_tensors(latents, rows, [model.captions_of(row) for row in rows]))


def row(where: str, folder: AnyPath, model: Model, samples: int, chosen: int) -> str:
    """Read the chosen samples in blocks, twice; return a line of the table."""
    draw = np.random.default_rng(0)
    train_ids = np.sort(draw.choice(samples, chosen, replace=False)).tolist()
    wanted = sum(model.latent_bytes + len(json.dumps(model.captions_of(each))) for each in train_ids)
    cells = []
    for _ in range(2):
        with (on_disk if isinstance(folder, Path) else in_store)() as taken:
            for start in range(0, chosen, BLOCK):
                found = read_latent_rows(folder, train_ids[start : start + BLOCK])
                assert sum(len(rows.captions or ()) for rows in found) == len(train_ids[start : start + BLOCK])
        cells.append(taken)
    first, again = cells
    parts = len({each // LATENT_PART_SAMPLES for each in train_ids})
    before = LATENT_PART_SAMPLES * parts * (model.latent_bytes + 4 * model.captions * model.condition)
    seconds = f"{first.seconds:.1f}" if first.seconds else "-"
    return (
        f"| {where} | {model.title} | {samples:,} | {wanted / 1e6:,.1f} | {first.bytes / 1e6:,.1f} | "
        f"{first.bytes / wanted:.3f} | {again.bytes / wanted:.3f} | {first.reads:,} | {seconds} | {before / 1e9:,.0f} |"
    )


def share_of_captions(config: PipelineConfig) -> Iterator[str]:
    """Yield what a shard's scores take with captions encoded, and again with these in memory."""
    workspace = Workspace.at(config.workspace)
    (name,) = run_names(workspace)
    run = read_run_anew(str(config.workspace), name)
    family, numbers = family_of(run.config), list(range(run.artifacts["queries"].rows))
    artifacts = {kind: artifact for kind, artifact in run.artifacts.items() if kind != SketchParts.kind}
    train_ids = np.arange(run.config.teacher.shard_samples)
    captions = samples_table(run.artifacts["samples"].path)["captions"].slice(0, len(train_ids)).to_pylist()
    family.scores(run.context, artifacts, numbers, train_ids + len(train_ids))  # what a process loads once
    yield f"{len(train_ids)} samples, {sum(map(len, captions))} captions, {len(numbers)} queries"
    for how in ("captions encoded", "captions in memory"):
        started = time.process_time()
        family.scores(run.context, artifacts, numbers, train_ids)
        yield f"{how}: {time.process_time() - started:.2f} CPU s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--chosen", type=int, default=20_000)
    parser.add_argument("--stored", type=int, default=100_000, help="samples in the object store")
    parser.add_argument("--config", type=Path, help="of a finished run, to be looked at instead")
    arguments = parser.parse_args()
    if arguments.config is not None:
        for line in share_of_captions(load_config(arguments.config)):
            print(line, flush=True)
        return
    share = arguments.chosen / arguments.samples
    print("| from | latents of | samples | MB wanted | MB read | ratio | again | reads | CPU s | GB before |")
    print(f"| --- | --- |{' ---: |' * 8}")
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            write_sparse(Path(folder), model, arguments.samples)
            print(row("disk", Path(folder), model, arguments.samples, arguments.chosen), flush=True)
    from tests.object_store import empty_workspace, s3_server

    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        for model in MODELS[:1]:
            store = empty_workspace(url, patch)
            write_objects(store, model, arguments.stored)
            print(row("S3", store, model, arguments.stored, round(share * arguments.stored)), flush=True)


if __name__ == "__main__":
    main()
