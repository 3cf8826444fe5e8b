"""Add training samples to an index without building it anew: a new version, whose record names its parent."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from fastgda_core.errors import UsageError
from fastgda_core.search.build import add, faiss_version, read_index
from fastgda_core.search.on_disk import take_lists, with_lists, write_lists
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit, input_key
from storage_schemas.files import AnyPath, is_there, local_copy, matching
from storage_schemas.heads.records import INDEX_IDS, INDEX_LISTS, HeadRecord, IndexRecord, index_samples
from storage_schemas.snapshots.published import read_published
from storage_schemas.tombstones import removed_ids
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made, once
from tasks.context import Context
from tasks.distilling.added_vectors import added_vectors
from tasks.distilling.index import INDEX_MEAN, commit_version, files_beside, read_index_mean
from tasks.distilling.index_parts import IndexParts
from tasks.distilling.index_recall import HeldOut, held_out_queries
from tasks.distilling.labels import read_labels
from tasks.distilling.opened_index import open_search_index, release_of
from tasks.distilling.vectors import blocks_of
from tasks.distilling.versions import latest_index, read_head, space_of_head
from tasks.distilling.versions import read_index as read_version
from tasks.inputs.added_samples import append_samples
from tasks.inputs.samples import samples_artifact
from tasks.teaching.run import read_run_anew


@dataclass(frozen=True)
class Parent:
    """An index that can be added to: what it is of, and the context that makes vectors as its own were made."""

    context: Context
    index: Artifact
    record: IndexRecord
    head: Artifact
    head_record: HeadRecord
    samples: Artifact

    @property
    def vector_paths(self) -> list[AnyPath]:
        """The parts of its vectors.

        Raises:
            UsageError: they are gone, and with them what its recall is measured against.
        """
        workspace, paths = self.context.workspace, []
        for key in self.record.vectors:
            found = matching(workspace.vectors(key), "part-*.parquet")
            if not found:
                raise UsageError(
                    f"{workspace.vectors(key)}, the vectors of index {self.index.key}, are gone: "
                    "`fastgda index build CONFIG` makes them again"
                )
            paths += found
        return paths


def read_parent(workspace: Workspace, version: str | None = None) -> Parent:
    """Read an index that samples are added to, by default the served one, or the newest where none is served.

    Raises:
        UsageError: there is none, or an earlier release built it and its vectors were not kept.
    """
    published = read_published(workspace)
    index, record = read_version(workspace, version or published.index_version or latest_index(workspace))
    if not record.vectors:
        raise UsageError(
            f"index {index.key} is of an earlier release, which kept no vectors: `fastgda index build CONFIG` makes "
            "one that can be added to"
        )
    head, head_record = read_head(workspace, record.head)
    context = read_run_anew(str(workspace.root), head_record.run or published.run).context
    samples = samples_artifact(workspace.file(index_samples(workspace, head.path, index.path)))
    return Parent(space_of_head(context, head_record), index, record, head, head_record, samples)


@task(task_run_name="added to index", cache_policy=NO_CACHE)
def add_to_search_index(parent: Parent, tars: Sequence[Path]) -> Made:
    """Make a version with the samples of some tars behind those of an index, unless it is there.

    Old samples keep their train_ids and vectors. The kind and what the index learned stay, too: after many additions a
    build anew serves better, which the recall tells, that is measured again.
    """
    workspace = parent.context.workspace
    samples = append_samples(workspace, parent.samples, tars)
    centred = is_there(parent.index.path / INDEX_MEAN)
    mean = read_index_mean(parent.index.path) if centred else None
    vectors = added_vectors(parent.context, samples, parent.head, parent.samples.rows, mean)
    release = release_of(faiss_version())
    # What is taken down and in the parent already is left out by whoever searches.
    down = removed_ids(workspace, samples.path)
    down = down[down >= parent.samples.rows]
    left_out = [down.tolist()] if len(down) else []
    key = input_key(
        "added to index", parent.index.key, vectors.artifact.key, release, *left_out, table=tables.INDEX_IDS
    )
    folder = workspace.index(key)

    def make(started: float) -> Manifest:
        old = parent.vector_paths
        # Refuses what is not as it was committed.
        opened = open_search_index(parent.index.path, parent.head.key).index
        index = read_index(local_copy(parent.index.path / "index.faiss"))
        vectors.made()
        train_ids = [tables.read(parent.index.path / INDEX_IDS, tables.INDEX_IDS)["train_id"].to_numpy()]
        for block in blocks_of(vectors.paths, down):
            add(index, block.vectors, block.train_ids)
            train_ids.append(block.train_ids)
        ids = np.concatenate(train_ids)
        removed = np.setdiff1d(np.arange(samples.rows), ids)
        kind, paths = parent.record.kind, [*old, *vectors.paths]
        lists = folder / INDEX_LISTS if parent.record.on_disk else None
        if lists is not None:  # the index has what is added alone, and the file of its parent stays as it is
            write = functools.partial(write_lists, [opened, index])
            commit(lists, write, key=key, rows=len(ids), started=started)
            index = with_lists(take_lists(index), local_copy(lists))
        parts = IndexParts(workspace.index_parts(key), key, kind, int(index.d), paths, removed, lists)
        record = parent.record.model_copy(
            update={
                "samples": workspace.relative(samples.path),
                "vectors": [*parent.record.vectors, vectors.artifact.key],
                "parent": parent.index.key,
                "reason": f"as index {parent.index.key}, with {len(ids) - parent.index.rows:,} samples added",
            }
        )
        held_out = _held_out(parent, parts)
        return commit_version(folder, key, index, ids, record, held_out, parts, mean, started=started)

    artifact = Artifact("index", key, folder, samples.rows)
    return once(artifact, folder / "index.faiss", make, beside=files_beside(folder, mean), alone_in=workspace)


def _held_out(parent: Parent, parts: IndexParts) -> HeldOut:
    """Return queries that recall is measured on: those of the head's snapshot, as when the index was built."""
    context, head = parent.context, parent.head_record
    if head.snapshot is None:
        return held_out_queries(context, parent.samples, parent.head, (), parts)
    labels = read_labels(context.workspace, head.snapshot)
    return held_out_queries(context, labels.samples, parent.head, labels.queries, parts)
