"""Train the rank head on rank labels, and build the index that serves it."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from safetensors.torch import save_file
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.candidates import CandidateScores
from fastgda_core.evaluation.ranking_metrics import top_mask
from fastgda_core.ranking.batches import RankPairs, first_pairs
from fastgda_core.ranking.head import RankHead, load_head, load_release_checkpoint, save_head
from fastgda_core.ranking.losses import LOSSES
from fastgda_core.search.index import build_index, write_index
from storage_schemas import tables
from storage_schemas.commit import code_version, commit, commit_table, committed, input_key, read_manifest
from storage_schemas.files import AnyPath, file_sha256, local_files, matching
from storage_schemas.snapshots import index_description, read_influence
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.config import PipelineConfig
from tasks.context import Context, Stage, load_tensors, pick_device
from tasks.features import (
    feature_mean,
    in_space,
    load_encoders,
    load_features,
    load_query_features,
    map_features,
    weights_keys,
)
from tasks.head_space import described, described_space
from tasks.pictures import loss_curve
from tasks.progress import stage
from tasks.publish import load_influence, run_behind
from tasks.queries import joined_queries
from tasks.sole_maker import sole_maker

ROWS_AT_ONCE = 300_000
INDEX_MEAN = "mean.safetensors"  # of the training samples' features, beside an index of a head over centred ones


def candidate_scores(context: Context, ranks: Stage, query_ids: Sequence[str]) -> CandidateScores:
    """The teacher's scores of some queries' candidates; negative ones are 0 where the labels tie them."""
    table = load_influence(context, ranks, list(query_ids))
    number = pc.index_in(table["query_id"], pa.array(query_ids, pa.string())).to_numpy()
    columns = (number, table["train_id"].to_numpy(), table["score"].to_numpy())
    return CandidateScores.of(*(torch.from_numpy(each.copy()) for each in columns), queries=len(query_ids))


def sample_features(context: Context, samples: Stage) -> Tensor:
    """phi of all samples, (samples, d): in memory, or mapped from a file where `head.resident` is false."""
    return load_features(context, samples, samples) if context.config.head.resident else map_features(context, samples)


def rank_pairs(
    workspace: Workspace, ranks: Stage, query_ids: Sequence[str], rows: Tensor, samples: int, *, standardised: bool
) -> RankPairs:
    """The labelled pairs of some queries, read a few queries at a time: a hundred million take 0.8 GB.

    Args:
        workspace: where the rank labels are.
        ranks: their snapshot.
        query_ids: of all queries.
        rows: numbers of the wanted ones, ascending.
        samples: how many training samples there are.
        standardised: labels are scores, of mean 0 and deviation 1 within their query, instead of rank labels; negative
            ones are 0 before that where the labels tie them, and non-candidates have the least one of their query.
    """
    sample, label = np.empty(ranks.rows, np.int32), np.empty(ranks.rows, np.float32)
    count = torch.zeros(len(query_ids), dtype=torch.int64)
    outside = torch.ones(len(query_ids))
    at_once = max(1, ROWS_AT_ONCE * len(query_ids) // max(1, ranks.rows))
    filled = 0
    for few in torch.split(rows, at_once):
        names = [query_ids[row] for row in few.tolist()]
        table = read_influence(workspace, ranks.key, names)
        number = pc.index_in(table["query_id"], pa.array(names)).to_numpy()
        if standardised:
            values, least = _standardised(table["score"].to_numpy(), number, len(few))
            outside[few] = torch.from_numpy(least).float()
        else:
            values = table["rank_label"].to_numpy()
        train_id = table["train_id"].to_numpy()
        order = np.argsort(number * samples + train_id)
        count[few] = torch.from_numpy(np.bincount(number, minlength=len(few)))
        stretch = slice(filled, filled + len(order))
        sample[stretch], label[stretch] = train_id[order], values[order]
        filled = stretch.stop
    found = torch.from_numpy(sample[:filled]), torch.from_numpy(label[:filled])
    return RankPairs(first_pairs(count), *found, outside, samples)


def _standardised(score: NDArray[np.float64], query: NDArray[np.int64], queries: int) -> tuple[Any, Any]:
    """Scores with mean 0 and deviation 1 within their query, (n,), and the least of each query, (queries,)."""
    count = np.maximum(np.bincount(query, minlength=queries), 1)
    centred = score - (np.bincount(query, score, queries) / count)[query]
    deviation = np.sqrt(np.bincount(query, centred**2, queries) / count)
    values = centred / np.where(deviation > 0, deviation, 1.0)[query]
    least = np.zeros(queries)
    np.minimum.at(least, query, values)
    return values, least


def rows_of_split(queries: Sequence[Stage], split: str) -> Tensor:
    return torch.tensor([row for row, query in enumerate(joined_queries(queries)) if query.split == split])


@task(task_run_name="rank head", cache_policy=NO_CACHE)
def fit_rank_head(context: Context, samples: Stage, queries: Sequence[Stage], features: Stage, ranks: Stage) -> Stage:
    """`head.safetensors` and `head.json` of a head version, named after everything it was trained on."""
    config = context.config
    key = input_key("head 3", ranks.key, features.key, config.head.learned, config.evaluation.validation_cutoff)
    with sole_maker(context, "rank head", context.workspace.head(key) / "head.safetensors", key):
        return _rank_head(context, samples, queries, ranks, key)


def _rank_head(context: Context, samples: Stage, queries: Sequence[Stage], ranks: Stage, key: str) -> Stage:
    config = context.config
    folder = context.workspace.head(key)
    manifest = committed(folder / "head.safetensors", key)
    reused = manifest is not None
    if manifest is None:
        # Lightning takes seconds to import, which a run that reuses its head need not wait for.
        from fastgda_core.ranking.training import HeadTraining, RankData, train_head

        started = time.monotonic()
        train, validation = rows_of_split(queries, "train"), rows_of_split(queries, "validation")
        query_ids = [query.query_id for query in joined_queries(queries)]
        scores = candidate_scores(context, ranks, [query_ids[row] for row in validation.tolist()])
        standardised = LOSSES[config.head.loss].standardised_scores
        data = RankData(
            query_features=load_query_features(context, queries, samples),
            sample_features=sample_features(context, samples),
            train_pairs=rank_pairs(context.workspace, ranks, query_ids, train, samples.rows, standardised=standardised),
            validation=validation,
            validation_scores=scores,
            relevant=top_mask(scores.scores, config.evaluation.validation_cutoff),
        )
        with stage("rank head", config.head.epochs) as advance:
            training = HeadTraining(**config.head.model_dump())
            trained = train_head(data, training, lambda: advance(1), _checkpoints(folder))
        description = {
            "loss": config.head.loss,
            "features": data.sample_features.shape[1],
            **described(config.features, context.workspace),
            "run": run_behind(context, ranks),
            "snapshot": ranks.key,
            "origin": flow_run.get_id() or "",
            "code_version": code_version(),
            "best_epoch": trained.best_epoch,
            "history": [{"loss": loss, "validation_map": value} for loss, value in trained.history],
        }
        text = json.dumps(description, indent=2) + "\n"
        epochs = len(trained.history)
        table = "".join(f"{epoch},{loss},{value}\n" for epoch, (loss, value) in enumerate(trained.history, start=1))
        log = f"epoch,loss,validation_map\n{table}"
        picture = loss_curve(description, config.evaluation.validation_cutoff)
        commit(folder / "training.csv", lambda path: path.write_text(log), key=key, rows=epochs, started=started)
        commit(folder / "training.png", lambda path: path.write_bytes(picture), key=key, rows=epochs, started=started)
        commit(folder / "head.json", lambda path: path.write_text(text), key=key, rows=1, started=started)
        manifest = commit(
            folder / "head.safetensors",
            lambda path: save_head(trained.head, path),
            key=key,
            rows=len(data.train_pairs),
            started=started,
            device=str(context.device),
        )
        if checkpoints := _checkpoints(folder):
            shutil.rmtree(checkpoints)
    return Stage("rank head", key, folder, manifest.rows, manifest.seconds, reused)


def _checkpoints(folder: AnyPath) -> Path | None:
    """Where a training keeps what it needs to go on after a crash; none in an object store."""
    return folder / "checkpoints" if isinstance(folder, Path) else None


def import_head(config: PipelineConfig, checkpoint: Path) -> Stage:
    """A head version from a checkpoint of FastGDA's release, over the feature space of the configuration.

    It never saw centred features and gets none, whatever `features.centre` says.

    Raises:
        UsageError: the checkpoint cannot be used, or its features are not those of that space.
    """
    head, space = load_release_checkpoint(checkpoint), config.features.model_copy(update={"centre": False})
    encoders = load_encoders(space, pick_device(config.device))
    anything: dict[str, Any] = {"image": Image.new("RGB", (64, 64)), "text": "a caption"}
    widths = [encoder.encode([anything[encoder.modality]]).shape[1] for encoder in encoders]
    if sum(widths) != head.features:
        raise UsageError(
            f"{checkpoint} takes {head.features} features, {space.space} has {' + '.join(map(str, widths))}: "
            "name the space that it was trained on in features.space"
        )
    started, sha256 = time.monotonic(), file_sha256(checkpoint)
    key = input_key("imported head", sha256, space.space, weights_keys(space), space.unit_length)
    workspace = Workspace.at(config.workspace)
    folder = workspace.head(key)
    manifest = committed(folder / "head.safetensors", key)
    reused = manifest is not None
    if manifest is None:
        description = {
            "features": head.features,
            **described(space, workspace),
            "imported_from": checkpoint.name,
            "sha256": sha256,
            "code_version": code_version(),
        }
        text = json.dumps(description, indent=2) + "\n"
        commit(folder / "head.json", lambda path: path.write_text(text), key=key, rows=1, started=started)
        manifest = commit(
            folder / "head.safetensors", lambda path: save_head(head, path), key=key, rows=0, started=started
        )
    return Stage("rank head", key, folder, manifest.rows, manifest.seconds, reused)


def space_of_head(context: Context, description: dict[str, Any]) -> Context:
    """The context with the feature space of a head, whatever is configured since."""
    space = described_space(description, context.workspace, context.config.features.weights)
    return in_space(context, **space.model_dump(include={"space", "weights", "unit_length", "centre"}))


def load_trained_head(folder: AnyPath) -> RankHead:
    """A head version, from disk or from an object store."""
    return load_head(local_files(folder, ("head.json", "head.safetensors")))


def read_head(workspace: Workspace, version: str) -> tuple[Stage, dict[str, Any]]:
    """A trained head as a stage, and its `head.json`.

    Raises:
        UsageError: there is no such head.
    """
    return _read(
        workspace, workspace.head(version) / "head.safetensors", version, "rank head", "SELECT head FROM heads"
    )


def read_index_head(workspace: Workspace, version: str) -> tuple[Stage, str]:
    """A built index as a stage, and the version of the head whose vectors it holds.

    Raises:
        UsageError: there is no such index.
    """
    path = workspace.index(version) / "index.faiss"
    stage_, description = _read(workspace, path, version, "index", "SELECT index_version FROM indexes")
    return stage_, description["head"]


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


def _read(workspace: Workspace, path: AnyPath, version: str, what: str, listing: str) -> tuple[Stage, dict[str, Any]]:
    """The stage that a committed file is of, and the JSON file that describes it."""
    manifest = committed(path, version)
    if manifest is None:
        raise UsageError(f"no {what} {version!r}: {command(workspace, f'sql {shlex.quote(listing)}')} lists them")
    description = json.loads(path.with_suffix(".json").read_text())
    return Stage(what, version, path.parent, manifest.rows, manifest.seconds, True), description


def latest_head(workspace: Workspace) -> str:
    """The head that was trained last.

    Raises:
        UsageError: there is none.
    """
    return _latest(matching(workspace.root / "heads", "*/head.safetensors"), "rank head", "train")


def latest_index(workspace: Workspace) -> str:
    """The index that was built last.

    Raises:
        UsageError: there is none.
    """
    return _latest(matching(workspace.root / "indexes", "*/index.faiss"), "index", "index")


def _latest(paths: list[AnyPath], what: str, command: str) -> str:
    made = {path.parent.name: manifest.committed_at for path in paths if (manifest := read_manifest(path))}
    ages = {version: at for version, at in made.items() if at is not None}
    if not ages:
        raise UsageError(f"the workspace has no {what} yet: `fastgda {command} CONFIG` makes one")
    return max(ages, key=lambda version: ages[version])


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
