"""Build the search index that serves a rank head, measure it, and open it."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from safetensors.torch import save_file
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.search.build import faiss_version, new_index, write_index
from fastgda_core.search.kinds import Choice, bytes_each, choose_kind
from fastgda_core.search.on_disk import can_lie_on_disk, take_lists
from storage_schemas import tables
from storage_schemas.commit import Manifest, code_version, commit, commit_table, committed, input_key, read_manifest
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath
from storage_schemas.heads.records import (
    INDEX_FILE,
    INDEX_IDS,
    INDEX_LISTS,
    IndexRecord,
    as_json,
    read_head_record,
    read_index_record,
)
from tasks.artifact import Artifact, Made, once
from tasks.config.distilling import IndexConfig
from tasks.context import Context, load_tensors
from tasks.distilling.index_parts import IndexParts
from tasks.distilling.index_recall import HeldOut, held_out_queries, measured
from tasks.distilling.opened_index import believe, release_of
from tasks.distilling.vectors import head_vectors, read_vectors
from tasks.inputs.features import feature_mean
from tasks.progress import stage

INDEX_MEAN = "mean.safetensors"  # of the training samples' features, beside an index of a head over centred ones
log = logging.getLogger("fastgda.index")


def read_index_mean(index: AnyPath) -> Tensor:
    """Read the mean, (d,), that was subtracted from an index's features and is subtracted from a query's.

    Raises:
        UsageError: the file is gone.
    """
    try:
        return load_tensors(index / INDEX_MEAN)["mean"]
    except FileNotFoundError:
        raise UsageError(
            f"{index} lacks {INDEX_MEAN}, which centres a query's features: `fastgda index build CONFIG` makes it again"
        ) from None


@task(task_run_name="index", cache_policy=NO_CACHE)
def build_search_index(
    context: Context,
    samples: Artifact,
    features: Artifact,
    head: Artifact,
    queries: Sequence[Artifact] = (),
    removed: Sequence[int] = (),
) -> Made:
    """Build an index, unless it is there: one immutable version of `index.faiss`, ids, record and mean of features.

    Its vectors are kept in parts of their own, from which another kind is built without the head. Every step is
    committed, so that the next start goes on where one ended.

    Args:
        queries: query sets whose vectors recall is measured on; vectors that stand for queries join them.
        removed: train_ids that the index leaves out.
    """
    build = _Build(context, samples, features, head, queries, np.unique(np.array(removed, np.int64)))
    artifact = Artifact("index", build.key, build.folder, samples.rows)
    beside = files_beside(build.folder, build.mean)
    return once(artifact, build.folder / "index.faiss", build.make, beside=beside, alone_in=context.workspace)


def make_index_parts(
    context: Context,
    samples: Artifact,
    features: Artifact,
    head: Artifact,
    numbers: Sequence[int],
    *,
    queries: Sequence[Artifact] = (),
    removed: Sequence[int] = (),
) -> int:
    """Make some parts of an index that another process merges, unless it is there; return how many parts there are.

    Raises:
        UsageError: there is no such part, or indexes of this kind have none.
    """
    build = _Build(context, samples, features, head, queries, np.unique(np.array(removed, np.int64)))
    parts = build.parts()
    if not parts.mergeable:
        raise UsageError(f"an index of kind {parts.kind} is built in one piece: leave out --part, or set index.kind")
    if beyond := [number for number in numbers if number >= parts.count]:
        raise UsageError(f"the index has no part {beyond[0]}: it has {parts.count}, counted from 0")
    if committed(build.folder / "index.faiss", build.key) is not None:
        return parts.count
    build.vectors.made(sorted({each for number in numbers for each in parts.vectors_of(number)}))
    with stage("index", len(numbers)) as advance:
        for number in numbers:
            parts.make(number, lambda _: None)
            advance(1)
    return parts.count


class _Build:
    """One index version: from what, and where."""

    def __init__(
        self,
        context: Context,
        samples: Artifact,
        features: Artifact,
        head: Artifact,
        queries: Sequence[Artifact],
        removed: NDArray[np.int64],
    ) -> None:
        self.context, self.samples, self.head, self.queries, self.removed = context, samples, head, queries, removed
        self.mean = feature_mean(context, samples)
        self.vectors = head_vectors(context, samples, features, head, self.mean)
        self.key = input_key(
            "index 2",
            self.vectors.artifact.key,
            context.config.index,
            [each.key for each in queries],
            removed.tolist(),
            release_of(faiss_version()),
            table=tables.INDEX_IDS,
        )
        self.folder = context.workspace.index(self.key)

    def parts(self) -> IndexParts:
        """Choose the kind; training is left to whoever needs it first, and the vectors that it needs are made."""
        self.vectors.made([0])
        paths = self.vectors.paths
        width = read_vectors(paths[0]).vectors.shape[1]
        # Of sketches a byte a number would do; cosines that differ in the fourth digit keep theirs.
        half = read_head_record(self.head.path).kind == "gradient"
        config, rows = self.context.config.index, self.samples.rows - len(self.removed)
        choice = chosen(config, rows, width, half=half)
        lists = self.folder / INDEX_LISTS if beyond_memory(config, choice.kind, rows, width) else None
        if lists is not None and "on disk" not in choice.reason:
            choice = Choice(choice.kind, f"{choice.reason}; larger than index.memory_gb, so its lists stay on disk")
        parts = IndexParts(
            self.context.workspace.index_parts(self.key), self.key, choice.kind, width, paths, self.removed, lists
        )
        self.vectors.made(parts.learns_from)
        self.choice = choice
        return parts

    def make(self, started: float) -> Manifest:
        self.vectors.made()
        parts = self.parts()
        log.info("index %s: %s: %s", self.key, self.choice.kind, self.choice.reason)
        with stage("index", self.samples.rows) as advance:
            index = parts.whole(advance)
        train_ids = np.setdiff1d(np.arange(self.samples.rows), self.removed)
        held_out = held_out_queries(self.context, self.samples, self.head, self.queries, parts)
        record = IndexRecord(
            head=self.head.key,
            samples=self.context.workspace.relative(self.samples.path),
            reason=self.choice.reason,
            vectors=[self.vectors.artifact.key],
            target=self.context.config.index.recall,
        )
        manifest = commit_version(
            self.folder, self.key, index, train_ids, record, held_out, parts, self.mean, started=started
        )
        parts.clear()
        return manifest


def files_beside(folder: AnyPath, mean: Tensor | None) -> list[AnyPath]:
    """Return the files without which the index in a folder has to be made again."""
    names = [INDEX_FILE, INDEX_IDS, *([] if mean is None else [INDEX_MEAN])]
    with suppress(StoreError):  # a damaged record has to be made again anyway
        names += [INDEX_LISTS] if read_index_record(folder).on_disk else []
    return [folder / name for name in names]


def beyond_memory(config: IndexConfig, kind: str, rows: int, width: int) -> bool:
    """Return whether an index is larger than its budget of memory, and of a kind whose lists may stay on disk."""
    if config.memory_gb is None or rows * bytes_each(kind, width, rows) <= config.memory_gb * 1e9:
        return False
    return can_lie_on_disk(new_index(kind, width))


def chosen(config: IndexConfig, rows: int, width: int, *, half: bool) -> Choice:
    """Return the kind of index that a configuration asks for, or that suits its budgets."""
    if config.kind != "auto":
        return Choice(config.kind, "index.kind of the configuration")
    memory = None if config.memory_gb is None else config.memory_gb * 1e9
    return choose_kind(rows, width, half=half, memory=memory, latency=config.latency_ms)


def commit_version(
    folder: AnyPath,
    key: str,
    index: Any,
    train_ids: NDArray[np.int64],
    about: IndexRecord,
    held_out: HeldOut,
    parts: IndexParts,
    mean: Tensor | None,
    *,
    started: float,
) -> Manifest:
    """Measure an index and commit its version: ids, record, mean, and the index last.

    Its lists are committed before, where they are a file of their own.
    """
    record = measured(index, train_ids, about, held_out, parts).model_copy(
        update={
            "kind": parts.kind,
            "faiss": faiss_version(),
            "rows": len(train_ids),
            "width": parts.width,
            "on_disk": parts.lists is not None,
            "origin": flow_run.get_id() or "",
            "code_version": code_version(),
        }
    )
    rows = tables.INDEX_IDS.rows(train_id=train_ids)
    commit_table(folder / INDEX_IDS, rows, tables.INDEX_IDS, key=key, started=started)
    write_record = functools.partial(Path.write_bytes, data=as_json(record))
    commit(folder / INDEX_FILE, write_record, key=key, rows=1, started=time.monotonic())
    if mean is not None:
        save_mean = functools.partial(save_file, {"mean": mean})
        commit(folder / INDEX_MEAN, save_mean, key=key, rows=len(train_ids), started=started)
    if parts.lists is not None:
        noted = read_manifest(parts.lists)
        assert noted is not None
        believe(parts.lists, noted)
    write = functools.partial(write_index, index if parts.lists is None else take_lists(index))
    manifest = commit(folder / "index.faiss", write, key=key, rows=len(train_ids), started=started)
    believe(folder / "index.faiss", manifest)
    return manifest
