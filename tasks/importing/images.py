"""Training samples and queries of the release as tables of a workspace."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from fastgda_core.errors import BadSample, UsageError
from fastgda_core.images import decode_image
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from storage_schemas.files import AnyPath, file_sha256
from storage_schemas.indexed_samples import write_indexed
from storage_schemas.workspace import Workspace, twins_beside
from tasks.artifact import Artifact, once
from tasks.context import Context
from tasks.importing.layout import SPLITS, ReleaseFolder
from tasks.inputs.coco import CocoImage, picture_folder, read_captions_file
from tasks.inputs.queries import queries_artifact, query_row
from tasks.inputs.samples import describe, ingest_samples, rejection_rows, sample_rows, samples_artifact
from tasks.inputs.tars import Rejection, ShardSample

VALIDATION_SHARE = 0.02  # of the training queries, the last ones: 100 of the release's 5,000


def has_pictures(folder: ReleaseFolder) -> bool:
    """Return whether the training pictures are there, and not captions alone."""
    return picture_folder(folder.annotations).is_dir()


def training_images(folder: ReleaseFolder) -> list[CocoImage]:
    """Read the training images, whose places are the release's train_ids.

    Raises:
        UsageError: the caption file cannot be used.
    """
    try:
        return read_captions_file(folder.annotations)
    except BadSample as error:
        raise UsageError(f"{folder.annotations} {error}") from error


def import_samples(context: Context, folder: ReleaseFolder) -> Artifact:
    """Commit the training samples in the order of the caption file, whose places are the release's train_ids.

    With the pictures they are what `data.shards` with the caption file gives, so that a curation goes on with them;
    without them they have captions alone.

    Raises:
        UsageError: a picture is missing or damaged: all later train_ids would be others.
    """
    if not has_pictures(folder):
        return _without_pictures(context.workspace, folder)
    samples = ingest_samples.fn(context).artifact
    rejected = tables.read(rejected_beside(samples), tables.REJECTED_SAMPLES)
    if rejected.num_rows:
        (first,) = rejected.slice(0, 1).to_pylist()
        raise UsageError(
            f"{rejected.num_rows:,} training pictures cannot be used and train_ids are places in the list of all; the "
            f"first: {describe(Rejection(**first))}. Fetch them again, or move {picture_folder(folder.annotations)} "
            "away to import without pictures"
        )
    return samples


def rejected_beside(samples: Artifact) -> AnyPath:
    """Return the table of what was rejected beside a table of samples."""
    return samples.path.parent / "rejected.parquet"


def _without_pictures(workspace: Workspace, folder: ReleaseFolder) -> Artifact:
    key = input_key("release samples", file_sha256(folder.annotations), table=tables.SAMPLES)
    path, rejected = workspace.samples(key), workspace.rejected_samples(key)
    pictures = picture_folder(folder.annotations)

    def make(started: float) -> Manifest:
        named = [
            ShardSample(
                str(pictures / image.file_name),
                Path(image.file_name).stem,
                0,
                0,
                list(dict.fromkeys(image.captions)),
                image.width,
                image.height,
                "",
                b"",
                "{}",
                1,
            )
            for image in training_images(folder)
        ]
        commit_table(rejected, rejection_rows([]), tables.REJECTED_SAMPLES, key=key, started=started)
        return commit_table(path, sample_rows(named), tables.SAMPLES, key=key, started=started)

    once(Artifact("samples", key, path, 0), path, make)
    write_indexed(workspace, path, rejected)
    return samples_artifact(path)


def read_query_captions(folder: ReleaseFolder, split: str) -> list[str]:
    """Read `captions.txt`: line i, from 0, is of picture i.

    Raises:
        UsageError: the file is no UTF-8, or a line is empty.
    """
    path = folder.queries(split) / "captions.txt"
    try:
        # Not by splitlines: a caption may hold U+2028 and the like, which Python takes for ends of lines.
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 ({error}): fetch it again") from error
    captions = [" ".join(line.split()) for line in lines]
    if "" in captions:
        raise UsageError(f"{path}: line {captions.index('') + 1} is empty, and lines are numbered: fetch it again")
    return captions


def query_names(split: str, count: int) -> list[str]:
    """Return the query_ids of a split's queries, `train-00000` and so on."""
    return [f"{split}-{number:05d}" for number in range(count)]


def validation_count(training: int) -> int:
    """Return how many of the training queries, the last ones, choose the best epoch.

    Raises:
        UsageError: there are too few.
    """
    if training < 2:
        raise UsageError(f"query_train has {training} queries: one to train on and one to validate with are needed")
    return max(1, round(VALIDATION_SHARE * training))


def import_queries(workspace: Workspace, folder: ReleaseFolder, captions: dict[str, list[str]]) -> Artifact:
    """Commit the queries of both splits as one query set: training ones first, then those of the test.

    Args:
        workspace: where to.
        folder: the release's.
        captions: of each split's queries, by the number of their picture.

    Raises:
        UsageError: a picture is missing or damaged.
    """
    files = {
        split: [folder.queries(split) / "images" / f"{number}.png" for number in range(len(captions[split]))]
        for split in SPLITS
    }
    for split, paths in files.items():
        if (missing := next((path for path in paths if not path.is_file()), None)) is not None:
            raise UsageError(f"{missing} is missing, of {len(paths)} captions in query_{split}/captions.txt: fetch it")
        there = len(list((folder.queries(split) / "images").glob("*.png")))
        if there != len(paths):
            raise UsageError(
                f"{folder.queries(split)} has {there} pictures and {len(paths)} captions: fetch both again"
            )
    hashes = [file_sha256(picture) for split in SPLITS for picture in files[split]]
    key = input_key("release queries", captions, hashes, table=tables.QUERIES)
    path = workspace.queries(key)
    training = len(files["train"])
    validation = training - validation_count(training)

    def make(started: float) -> Manifest:
        rows: list[dict[str, object]] = []
        for split, paths in files.items():
            names = query_names(split, len(paths))
            for number, picture in enumerate(paths):
                kind = "validation" if split == "train" and number >= validation else split
                png = _checked(picture)
                rows.append(query_row(path, len(rows), names[number], kind, captions[split][number], png))
        commit_table(twins_beside(path), tables.TWINS.schema.empty_table(), tables.TWINS, key=key, started=started)
        table = pa.Table.from_pylist(rows, schema=tables.QUERIES.schema)
        return commit_table(path, table, tables.QUERIES, key=key, started=started)

    once(Artifact("queries", key, path, 0), path, make)
    return queries_artifact(path)


def _checked(picture: Path) -> bytes:
    content = picture.read_bytes()
    try:
        decode_image(content)
    except BadSample as error:
        raise UsageError(f"{picture}: {error}; fetch it again") from error
    return content
