"""Build the search index that serves a rank head."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from safetensors.torch import save_file
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.search.index import build_index, write_index
from storage_schemas import tables
from storage_schemas.commit import Manifest, code_version, commit, commit_table, input_key
from storage_schemas.files import AnyPath
from storage_schemas.heads.records import INDEX_FILE, IndexRecord, as_json, read_head_record, read_index_record
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made, once
from tasks.context import Context, load_tensors
from tasks.distilling.answering import answering_head
from tasks.inputs.features import (
    feature_mean,
    load_features,
)
from tasks.progress import stage

INDEX_MEAN = "mean.safetensors"  # of the training samples' features, beside an index of a head over centred ones


def read_index_mean(index: AnyPath) -> Tensor:
    """Read the mean, (d,), that was subtracted from an index's features and is subtracted from a query's.

    Raises:
        UsageError: the file is gone.
    """
    try:
        return load_tensors(index / INDEX_MEAN)["mean"]
    except FileNotFoundError:
        raise UsageError(
            f"{index} lacks {INDEX_MEAN}, which centres a query's features: `fastgda index CONFIG` makes it again"
        ) from None


@task(task_run_name="index", cache_policy=NO_CACHE)
def build_search_index(context: Context, samples: Artifact, features: Artifact, head: Artifact) -> Made:
    """Build an index, unless it is there: one immutable version of `index.faiss`, ids, record and mean of features."""
    key = input_key("index", head.key, features.key, "with its head's version", table=tables.INDEX_IDS)
    folder, mean = context.workspace.index(key), feature_mean(context, samples)

    def make(started: float) -> Manifest:
        with stage("index", samples.rows) as advance:
            answering = answering_head(context.workspace, head.path)
            rows = torch.arange(samples.rows)
            vectors = answering.samples(rows, load_features(context, samples, samples)).numpy()
            # Of sketches a byte a number would do; cosines that differ in the fourth digit keep theirs.
            index = build_index(vectors, half=read_head_record(head.path).kind == "gradient")
            advance(samples.rows)
        rows = tables.INDEX_IDS.rows(train_id=np.arange(samples.rows))
        commit_table(folder / "ids.parquet", rows, tables.INDEX_IDS, key=key, started=started)
        _write_record(context.workspace, folder, key, head, samples)
        if mean is not None:
            save_mean = functools.partial(save_file, {"mean": mean})
            commit(folder / INDEX_MEAN, save_mean, key=key, rows=samples.rows, started=started)
        write = functools.partial(write_index, index)
        return commit(folder / "index.faiss", write, key=key, rows=samples.rows, started=started)

    beside = [folder / INDEX_MEAN] if mean is not None else []
    artifact = Artifact("index", key, folder, samples.rows)
    made = once(artifact, folder / "index.faiss", make, beside=beside, alone_in=context.workspace)
    if read_index_record(folder).samples is None:  # of an earlier release
        _write_record(context.workspace, folder, key, head, samples)
    return made


def _write_record(workspace: Workspace, folder: AnyPath, key: str, head: Artifact, samples: Artifact) -> None:
    record = IndexRecord(
        head=head.key,
        samples=workspace.relative(samples.path),
        origin=flow_run.get_id() or "",
        code_version=code_version(),
    )
    write = functools.partial(Path.write_bytes, data=as_json(record))
    commit(folder / INDEX_FILE, write, key=key, rows=1, started=time.monotonic())
