"""Train the rank head on rank labels, or import one."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.ranking_metrics import top_mask
from fastgda_core.ranking.head import RankHead, load_release_checkpoint, save_head
from fastgda_core.ranking.losses import LOSSES
from storage_schemas.commit import Manifest, code_version, commit, input_key
from storage_schemas.files import AnyPath, file_sha256
from storage_schemas.heads.records import HEAD_FILE, Epoch, as_json
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made, once
from tasks.config.inputs import FeaturesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.devices import pick_device
from tasks.distilling.head_space import space_record
from tasks.distilling.loss_curve import commit_curve
from tasks.distilling.ranks import (
    candidate_scores,
    rank_pairs,
    rows_of_split,
    run_behind,
    sample_features,
)
from tasks.inputs.features import (
    load_encoders,
    load_query_features,
    weights_keys,
)
from tasks.inputs.queries import joined_queries
from tasks.progress import stage

if TYPE_CHECKING:
    from fastgda_core.ranking.training import RankData, TrainedHead


@task(task_run_name="rank head", cache_policy=NO_CACHE)
def fit_rank_head(
    context: Context, samples: Artifact, queries: Sequence[Artifact], features: Artifact, ranks: Artifact
) -> Made:
    """Train a head, unless it is there: `head.safetensors` and `head.json` of a head version.

    The version is named after everything that the head was trained on.
    """
    config = context.config
    key = input_key("head 3", ranks.key, features.key, config.head.learned, config.evaluation.validation_cutoff)
    folder = context.workspace.head(key)

    def make(started: float) -> Manifest:
        data, trained = _train(context, samples, queries, ranks, _checkpoints(folder))
        record = space_record(config.features, context.workspace).model_copy(
            update={
                "loss": config.head.loss,
                "features": data.sample_features.shape[1],
                "run": run_behind(context.workspace, ranks),
                "snapshot": ranks.key,
                "best_epoch": trained.best_epoch,
                "history": [Epoch(loss=loss, validation_map=value) for loss, value in trained.history],
                "origin": flow_run.get_id() or "",
                "code_version": code_version(),
            }
        )
        epochs = len(trained.history)
        table = "".join(f"{epoch},{loss},{value}\n" for epoch, (loss, value) in enumerate(trained.history, start=1))
        contents = {"training.csv": f"epoch,loss,validation_map\n{table}".encode(), HEAD_FILE: as_json(record)}
        for name, content in contents.items():
            write = functools.partial(Path.write_bytes, data=content)
            commit(folder / name, write, key=key, rows=epochs, started=started)
        commit_curve(folder, record, config.evaluation.validation_cutoff, key=key, started=started)
        manifest = commit(
            folder / "head.safetensors",
            functools.partial(save_head, trained.head),
            key=key,
            rows=len(data.train_pairs),
            started=started,
            device=str(context.device),
        )
        if checkpoints := _checkpoints(folder):
            shutil.rmtree(checkpoints)
        return manifest

    return once(Artifact("rank head", key, folder, 0), folder / "head.safetensors", make, alone_in=context.workspace)


def _train(
    context: Context, samples: Artifact, queries: Sequence[Artifact], ranks: Artifact, checkpoints: Path | None
) -> tuple[RankData, TrainedHead]:
    # Lightning takes seconds to import, which a run that reuses its head need not wait for.
    from fastgda_core.ranking.training import HeadTraining, RankData, train_head

    config = context.config
    train, validation = rows_of_split(queries, "train"), rows_of_split(queries, "validation")
    query_ids = [query.query_id for query in joined_queries(queries)]
    scores = candidate_scores(context.workspace, ranks, [query_ids[row] for row in validation.tolist()])
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
        training = HeadTraining(**config.head.training, accelerator=context.device.type)
        return data, train_head(data, training, lambda: advance(1), checkpoints)


def _checkpoints(folder: AnyPath) -> Path | None:
    """Return where a training keeps what it needs to go on after a crash; None in an object store."""
    return folder / "checkpoints" if isinstance(folder, Path) else None


def import_head(config: PipelineConfig, checkpoint: Path) -> Made:
    """Make a head version from a checkpoint of FastGDA's release, over the feature space of the configuration.

    Such a head never saw centred features and gets none, whatever `features.centre` says.

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
    return keep_imported_head(Workspace.at(config.workspace), space, head, checkpoint)


def keep_imported_head(workspace: Workspace, space: FeaturesConfig, head: RankHead, checkpoint: Path) -> Made:
    """Commit a head of the release, read from a checkpoint, as a head version over a feature space."""
    sha256 = file_sha256(checkpoint)
    key = input_key("imported head", sha256, space.space, weights_keys(space), space.unit_length)
    folder = workspace.head(key)

    def make(started: float) -> Manifest:
        came_from = {"features": head.features, "imported_from": checkpoint.name, "sha256": sha256}
        record = space_record(space, workspace).model_copy(update={**came_from, "code_version": code_version()})
        write_record = functools.partial(Path.write_bytes, data=as_json(record))
        commit(folder / HEAD_FILE, write_record, key=key, rows=1, started=started)
        write = functools.partial(save_head, head)
        return commit(folder / "head.safetensors", write, key=key, rows=0, started=started)

    return once(Artifact("rank head", key, folder, 0), folder / "head.safetensors", make)
