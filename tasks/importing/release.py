"""The folder `data/coco` of the FastGDA release as a workspace: what a curation, a training and an index find there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgda_core.errors import UsageError
from fastgda_core.feature_spaces import encoder_names
from fastgda_core.ranking.head import RankHead, load_release_checkpoint
from storage_schemas.commit import Manifest, commit
from storage_schemas.files import write_atomically
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.publishing.release import Neighbors, import_release
from storage_schemas.publishing.release_pickle import read_neighbors
from storage_schemas.runs.ledger import read_run
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made, once
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, open_context
from tasks.distilling.heads import keep_imported_head
from tasks.importing.arrays import EncoderArrays, cosines, import_features, open_features
from tasks.importing.configuration import HEADER, config_text, release_config
from tasks.importing.denoiser import open_denoiser, write_model
from tasks.importing.fisher import ReleaseFisher, read_fisher
from tasks.importing.images import (
    has_pictures,
    import_queries,
    import_samples,
    query_names,
    read_query_captions,
    rejected_beside,
    training_images,
)
from tasks.importing.layout import SPACES, SPLITS, ReleaseFolder, open_release
from tasks.inputs.features import in_space
from tasks.teaching.curvature import curvature_of
from tasks.teaching.latents import latents_of

TEACHER = "abu_plus"


@dataclass(frozen=True)
class Asked:
    """The request of an import.

    root: the release's folder; workspace: where to; config: the configuration that is written; name: of the runs.
    space: the feature space of the configuration; None: that of the best head there is.
    pipeline: a folder of Stable Diffusion 2.1-base; encoders: a folder with one of weights for each encoder.
    """

    root: Path
    workspace: str
    config: Path
    name: str = "release"
    space: str | None = None
    pipeline: Path | None = None
    encoders: Path | None = None


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    config: as it was written; runs: of the training queries and of the test's; head: of the configuration's space, if
    there is one; heads: all by name of their file; lacking: what cannot be done, and what it needs, a line each.
    """

    config: PipelineConfig
    runs: list[str]
    head: Made | None
    heads: dict[str, Made]
    lacking: list[str] = field(default_factory=list)


def import_folder(asked: Asked) -> Imported:
    """Import a release's folder: what is there already is found, so that an import that was killed goes on.

    Everything but the scores and the pictures is checked before anything is written.

    Raises:
        UsageError, StoreError: a file is missing, damaged or contradicts another; nothing is published then.
    """
    _check_config(asked.config)
    folder = open_release(asked.root)
    captions = {split: read_query_captions(folder, split) for split in SPLITS}
    count = len(training_images(folder))
    rows = {"samples": count, **{split: len(captions[split]) for split in SPLITS}}
    arrays = open_features(folder, rows)
    heads = {path.stem: (path, load_release_checkpoint(path)) for path in folder.heads}
    lacking = [_fitting(space, *heads[space], arrays) for space in sorted(heads)]
    usable = {space: head for space, head in heads.items() if all(name in arrays for name in space.split("+"))}
    space = asked.space or _best_space(folder, set(usable))
    _check_space(space, arrays)
    model = asked.config.resolve().parent / f"{asked.name}-model"
    fisher, why = _model_and_fisher(folder, model, asked.pipeline)
    lacking += why

    settings: dict[str, Any] = {
        "workspace": asked.workspace,
        "model": model,
        "name": asked.name,
        "space": space,
        "weights": _weights(asked.encoders, list(arrays)),
        "samples": count,
        "near": "dino" in arrays,
        "fisher": fisher,
    }
    document = release_config(folder, **settings, candidates=count)
    context = open_context(PipelineConfig.model_validate(document), model=False)
    samples = import_samples(context, folder)
    queries = import_queries(context.workspace, folder, captions)
    for encoder in arrays:
        for items in (samples, queries):
            import_features(in_space(context, space=encoder), items, arrays)
    runs = _import_scores(context.workspace, folder, asked.name, samples, queries, arrays, rows)
    _publish(context.workspace, runs)
    record = read_run(context.workspace, runs[0])
    document = release_config(folder, **settings, candidates=record.pairs // record.shards)
    config = PipelineConfig.model_validate(document)
    if fisher is not None and not why:
        _keep_fisher(config, samples, fisher)
    kept = _keep_heads(context, usable)
    write_atomically(asked.config, config_text(document).encode())
    return Imported(config, runs, kept.get(space), kept, [line for line in lacking if line])


def _check_config(path: Path) -> None:
    if path.exists() and not path.read_text(errors="replace").startswith(HEADER):
        raise UsageError(f"{path} is there and was not written by an import: name another file with --config-file")


def _check_space(space: str, arrays: dict[str, EncoderArrays]) -> None:
    if missing := [name for name in encoder_names(space) if name not in arrays]:
        raise UsageError(f"--space {space}: feats/ has no outputs of {missing[0]}; it has those of {', '.join(arrays)}")


def _best_space(folder: ReleaseFolder, with_head: set[str]) -> str:
    order = [*SPACES, *sorted({*folder.spaces, *with_head} - set(SPACES))]
    return next(
        (space for space in order if space in with_head),
        next(space for space in order if space in folder.spaces),
    )


def _fitting(space: str, checkpoint: Path, head: RankHead, arrays: dict[str, EncoderArrays]) -> str:
    """Return why a head is left out; empty where it is not.

    Raises:
        UsageError: it takes other features than those in the folder.
    """
    names = space.split("+")
    if missing := [name for name in names if name not in arrays]:
        return f"{checkpoint.name} is left out: feats/ has no outputs of {missing[0]}"
    width = sum(arrays[name].width for name in names)
    if head.features != width:
        raise UsageError(f"{checkpoint} takes {head.features} features and {space} has {width}: fetch it again")
    return ""


def _weights(encoders: Path | None, names: list[str]) -> dict[str, str]:
    """Return the folders of weights on this machine; an encoder without one has its hub id."""
    if encoders is None:
        return {}
    if not encoders.is_dir():
        raise UsageError(f"--encoders {encoders} is no folder: give one with a folder for each of {', '.join(names)}")
    return {name: str((encoders / name).resolve()) for name in names if (encoders / name).is_dir()}


def _model_and_fisher(
    folder: ReleaseFolder, model: Path, pipeline: Path | None
) -> tuple[ReleaseFisher | None, list[str]]:
    """Write the model folder, read the Fisher, and say what a curation that goes on would lack."""
    lacking = []
    if not has_pictures(folder):
        lacking.append("no new queries can be scored, and no pictures are shown: trainset/train2017 is not there")
    if folder.denoiser is None:
        return None, [*lacking, "no new queries can be scored: model.bin is not there"]
    weights, unet = open_denoiser(folder.denoiser)
    fisher = read_fisher(folder.fisher, unet) if folder.fisher else None
    write_model(weights, unet, model, pipeline)
    if pipeline is None:
        lacking.append("no new queries can be scored: --pipeline has to name a folder of Stable Diffusion 2.1-base")
    if fisher is None:
        lacking.append("the Fisher will be made anew: ekfac_fisher is not there")
    return fisher, lacking


def _import_scores(
    workspace: Workspace,
    folder: ReleaseFolder,
    name: str,
    samples: Artifact,
    queries: Artifact,
    arrays: dict[str, EncoderArrays],
    rows: dict[str, int],
) -> list[str]:
    """Import the scores of both splits as a run each; those of the training queries have candidates."""
    near = None
    if folder.neighbors is not None and "dino" in arrays:
        near = Neighbors(
            folder.neighbors, read_neighbors(folder.neighbors), lambda row, ids: cosines(arrays["dino"], row, ids)
        )
    runs = []
    for split in SPLITS:
        path = folder.scores(split)
        assert path is not None  # open_release looked
        runs.append(
            import_release(
                workspace,
                path,
                name=name,
                teacher=TEACHER,
                query_ids=query_names(split, rows[split]),
                samples=workspace.relative(samples.path),
                rejected_samples=workspace.relative(rejected_beside(samples)),
                queries=workspace.relative(queries.path),
                neighbors=near if split == "train" else None,
            )
        )
    return runs


def _publish(workspace: Workspace, runs: list[str]) -> None:
    """Publish runs beside what is published, in place of earlier imports of the same files, as without pictures."""
    try:
        there = read_snapshot(workspace, read_published(workspace).snapshot).runs
    except NotPublished:
        there = []
    if set(runs) <= set(there):
        return
    files = [read_run(workspace, run).config["sha256"] for run in runs]
    kept = [run for run in there if run not in runs and read_run(workspace, run).config.get("sha256") not in files]
    publish_runs(workspace, [*kept, *runs])


def _keep_fisher(config: PipelineConfig, samples: Artifact, found: ReleaseFisher) -> None:
    """Commit the release's Fisher where a curation by this configuration looks for its own."""
    context = open_context(config)
    artifact = curvature_of(context, latents_of(context, samples))

    def make(started: float) -> Manifest:
        return commit(artifact.path, found.fisher.save, key=artifact.key, rows=found.count, started=started)

    once(artifact, artifact.path, make)


def _keep_heads(context: Context, heads: dict[str, tuple[Path, RankHead]]) -> dict[str, Made]:
    """Keep every head over its own feature space."""
    kept = {}
    for space, (checkpoint, head) in heads.items():
        features = context.config.features.model_copy(update={"space": space})
        kept[space] = keep_imported_head(context.workspace, features, head, checkpoint)
    return kept
