"""Features of the release: `feats/<space>/*.npy`, looked at through memory maps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.commit import commit_table
from storage_schemas.listings import committed_parts
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.importing.layout import ReleaseFolder
from tasks.inputs.features import PART_ITEMS, as_lists, feature_folders
from tasks.progress import stage

WIDTHS = {"dino": 768, "clip": 512, "clip_text": 512}  # of the release's encoders
FILES = {"samples": "data_feats", "train": "train_query_feats", "test": "test_query_feats"}


@dataclass(frozen=True)
class EncoderArrays:
    """One encoder's outputs as they are, (rows, width), of the samples and of the queries, training ones first."""

    samples: NDArray[Any]
    queries: tuple[NDArray[Any], ...]

    @property
    def width(self) -> int:
        return int(self.samples.shape[1])

    def query(self, row: int) -> NDArray[Any]:
        first, second = self.queries
        return first[row] if row < len(first) else second[row - len(first)]


def open_features(folder: ReleaseFolder, rows: dict[str, int]) -> dict[str, EncoderArrays]:
    """Map the outputs of every encoder that the folder has features of, by the encoder's name.

    Args:
        folder: the release's.
        rows: how many training samples, training queries and test queries there are, by the keys of `FILES`.

    Raises:
        UsageError: a file is missing, is no array of these rows, or two files disagree.
    """
    spaces = {
        space: {name: _open(folder.features(space) / f"{stem}.npy", rows[name]) for name, stem in FILES.items()}
        for space in folder.spaces
    }
    for space, arrays in spaces.items():
        if len({array.shape[1] for array in arrays.values()}) > 1:
            widths = {f"{FILES[name]}.npy": array.shape[1] for name, array in arrays.items()}
            raise UsageError(f"{folder.features(space)}: the files differ in width, {widths}: fetch them again")
    alone = {space: arrays for space, arrays in spaces.items() if "+" not in space}
    for space, arrays in spaces.items():
        if "+" in space:
            alone |= _parted(folder, space, arrays, alone)
    return {
        encoder: EncoderArrays(arrays["samples"], (arrays["train"], arrays["test"]))
        for encoder, arrays in alone.items()
    }


def _open(path: Path, rows: int) -> NDArray[Any]:
    """Map one file of floats."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        told = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UsageError(f"{path} cannot be read as an array ({told}): fetch it again") from error
    if array.ndim != 2 or array.dtype.kind != "f" or not array.shape[1]:
        raise UsageError(f"{path} holds {array.dtype} of shape {array.shape}, not floats (rows, width): fetch it again")
    if len(array) != rows:
        raise UsageError(f"{path} has {len(array):,} rows where there are {rows:,} images: fetch what belongs together")
    return array


def _parted(
    folder: ReleaseFolder, space: str, arrays: dict[str, NDArray[Any]], alone: dict[str, dict[str, NDArray[Any]]]
) -> dict[str, dict[str, NDArray[Any]]]:
    """Part joined outputs into those of their encoders, which lie end to end.

    Widths are those of the encoders' own files, else the published ones.
    """
    names, width = space.split("+"), arrays["samples"].shape[1]
    widths = [alone[name]["samples"].shape[1] if name in alone else WIDTHS.get(name, 0) for name in names]
    if sum(widths) != width or not all(widths):
        told = " + ".join(map(str, widths))
        raise UsageError(f"{folder.features(space)} is {width} wide and its encoders are {told}: fetch feats/ again")
    found, start = {}, 0
    for name, wide in zip(names, widths, strict=True):
        found[name] = {each: array[:, start : start + wide] for each, array in arrays.items()}
        start += wide
        for each, array in alone.get(name, {}).items():
            looked_at = np.unique(np.linspace(0, len(array) - 1, 16).astype(int))
            if not np.array_equal(array[looked_at], found[name][each][looked_at]):
                raise UsageError(f"{folder.features(space)} has other outputs of {name} than feats/{name}: remove one")
    return found


def import_features(context: Context, items: Artifact, arrays: dict[str, EncoderArrays]) -> None:
    """Commit the outputs of every encoder of the context's space for samples or queries, in parts of 1,024.

    They lie where `extract_features` would put what the encoders give, so that nothing is encoded.

    Raises:
        UsageError: a value is not finite.
    """
    for name, (place, key) in feature_folders(context, items).items():
        there = committed_parts(place, key)
        with stage(f"{name} of {items.name}", items.rows) as advance:
            for number, start in enumerate(range(0, items.rows, PART_ITEMS)):
                rows = range(start, min(start + PART_ITEMS, items.rows))
                if (path := part(place, number)).name not in there:
                    started = time.monotonic()
                    block = _block(arrays[name], items, rows)
                    if not np.isfinite(block).all():
                        row = rows[int(np.argmin(np.isfinite(block).all(1)))]
                        raise UsageError(f"feats: {name} of {items.name}, row {row}, is not finite: fetch it again")
                    table = tables.FEATURES.rows(
                        item=[str(row) for row in rows], feature=as_lists(torch.from_numpy(block))
                    )
                    commit_table(path, table, tables.FEATURES, key=key, started=started)
                advance(len(rows))


def _block(arrays: EncoderArrays, items: Artifact, rows: range) -> NDArray[np.float32]:
    if items.name == "samples":
        return np.array(arrays.samples[rows.start : rows.stop], np.float32, order="C")  # a copy: torch wants to write
    return np.stack([arrays.query(row) for row in rows]).astype(np.float32)


def cosines(arrays: EncoderArrays, row: int, train_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the cosine of a query and some training samples, (n,)."""
    order = np.argsort(train_ids)  # the file is read from front to back
    vectors = np.asarray(arrays.samples[train_ids[order]], np.float32)
    query = np.asarray(arrays.query(row), np.float32)
    found = np.empty(len(train_ids), np.float32)
    found[order] = vectors @ query / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))
    return found
