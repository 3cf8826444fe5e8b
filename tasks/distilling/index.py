"""Build the search index that serves a rank head."""

from __future__ import annotations

import functools
import json
import time

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from safetensors.torch import save_file
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.search.index import build_index, write_index
from storage_schemas import tables
from storage_schemas.commit import code_version, commit, commit_table, committed, input_key
from storage_schemas.files import AnyPath
from storage_schemas.heads.records import index_description
from storage_schemas.workspace import Workspace
from tasks.context import Context, Stage, load_tensors
from tasks.distilling.versions import load_trained_head
from tasks.inputs.features import (
    feature_mean,
    load_features,
)
from tasks.progress import stage
from tasks.sole_maker import sole_maker

INDEX_MEAN = "mean.safetensors"  # of the training samples' features, beside an index of a head over centred ones


def read_index_mean(index: AnyPath) -> Tensor:
    """What was taken off the features of an index's training samples, (d,), and is taken off a query's.

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
def build_search_index(context: Context, samples: Stage, features: Stage, head: Stage) -> Stage:
    """`index.faiss`, its id map, its head, what its features were centred by, its manifest: one immutable version."""
    key = input_key("index", head.key, features.key, "with its head's version", table=tables.INDEX_IDS)
    with sole_maker(context, "index", context.workspace.index(key) / "index.faiss", key):
        return _search_index(context, samples, head, key)


def _search_index(context: Context, samples: Stage, head: Stage, key: str) -> Stage:
    folder = context.workspace.index(key)
    manifest, mean = committed(folder / "index.faiss", key), feature_mean(context, samples)
    if mean is not None and committed(folder / INDEX_MEAN, key) is None:
        manifest = None
    reused = manifest is not None
    if manifest is None:
        started = time.monotonic()
        with stage("index", samples.rows) as advance:
            embeddings = load_trained_head(head.path)(load_features(context, samples, samples)).numpy()
            train_ids = np.arange(samples.rows)
            index = build_index(embeddings, train_ids)
            advance(samples.rows)
        commit_table(
            folder / "ids.parquet",
            tables.INDEX_IDS.rows(train_id=train_ids),
            tables.INDEX_IDS,
            key=key,
            started=started,
        )
        _describe_index(context.workspace, folder, key, head, samples)
        if mean is not None:
            commit(
                folder / INDEX_MEAN,
                functools.partial(save_file, {"mean": mean}),
                key=key,
                rows=samples.rows,
                started=started,
            )
        manifest = commit(
            folder / "index.faiss",
            lambda path: write_index(index, path),
            key=key,
            rows=samples.rows,
            started=started,
        )
    elif "samples" not in index_description(folder):  # of an earlier release
        _describe_index(context.workspace, folder, key, head, samples)
    return Stage("index", key, folder, manifest.rows, manifest.seconds, reused)


def _describe_index(workspace: Workspace, folder: AnyPath, key: str, head: Stage, samples: Stage) -> None:
    description = {
        "head": head.key,
        "samples": workspace.relative(samples.path),
        "origin": flow_run.get_id() or "",
        "code_version": code_version(),
    }
    text, started = json.dumps(description) + "\n", time.monotonic()
    commit(folder / "index.json", lambda path: path.write_text(text), key=key, rows=1, started=started)
