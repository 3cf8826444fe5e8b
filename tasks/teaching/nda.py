"""The nda teacher: small pictures of the samples, what each query's weights are divided by, then scores.

No pass of the model is made; of the model's folder its noise schedule is read, and the size of its pictures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastgda_core.diffusion.model import train_timesteps
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.schedule import Schedule, load_schedule
from fastgda_core.images import square
from fastgda_core.interruption import checkpoint
from fastgda_core.teachers.nda import PatchPlan, heat_maps, log_partitions, patch_scores
from storage_schemas.commit import Manifest, input_key
from storage_schemas.listings import quarantined_in
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, load_tensors
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import readable_images_ahead
from tasks.parts import Parts
from tasks.teaching.cost import KindCost, Size, block_shape, score_shards
from tasks.teaching.families import Artifacts, BlockScores
from tasks.teaching.tensor_parts import TensorParts

PICTURE_PART = 512  # samples
POSTERIOR_PART = 8  # queries: as many patches at once as fill a matrix product
MOST_PIXELS = 32  # a side, as of CIFAR's pictures, on which the method was published
PUBLISHED_NOISE = 0.1  # the timestep as a share of the schedule: 100 of 1,000 in the published commands


class PictureParts(TensorParts):
    """Every sample as a small square RGB picture, in parts of 512: pictures (n, 3, side, side) uint8."""

    kind = title = "patch pictures"

    def __init__(self, context: Context, samples: Artifact, pictures: Artifact) -> None:
        self.context, self.samples, self.artifact = context, samples, pictures

    @property
    def count(self) -> int:
        return -(-self.samples.rows // PICTURE_PART)

    def rows(self, number: int) -> int:
        return min(PICTURE_PART, self.samples.rows - number * PICTURE_PART)

    def make(self, number: int) -> Manifest:
        started, first, side = time.monotonic(), number * PICTURE_PART, picture_side(self.context)
        unreadable: dict[int, str] = {}
        pictures: list[Tensor] = []
        train_ids = list(range(first, first + self.rows(number)))
        for images, faults in readable_images_ahead(self.samples.path, train_ids, 64):
            checkpoint()
            pictures.append(_small(images, side))
            unreadable |= faults
        return self.keep(number, {"pictures": torch.cat(pictures)}, started, device="cpu", quarantined=unreadable)


class PosteriorParts(TensorParts):
    """What the weights of the training patches are divided by, for eight queries a part, against all samples.

    pictures: the queries', (queries, 3, side, side) uint8. log_partitions: (queries, views, places) float64.
    """

    kind = title = "patch posteriors"
    of_queries = True

    def __init__(self, context: Context, pictures: Artifact, queries: Artifact, posteriors: Artifact) -> None:
        self.context, self.pictures, self.queries, self.artifact = context, pictures, queries, posteriors

    @property
    def count(self) -> int:
        return -(-self.queries.rows // POSTERIOR_PART)

    def rows(self, number: int) -> int:
        return min(POSTERIOR_PART, self.queries.rows - number * POSTERIOR_PART)

    def make(self, number: int) -> Manifest:
        started, context = time.monotonic(), self.context
        first = number * POSTERIOR_PART
        several = load_queries(self.queries)[first : first + self.rows(number)]
        asked = _small([query.image for query in several], picture_side(context))
        plan, schedule = patch_plan(context)
        partitions = log_partitions(plan, schedule, _scaled(context, asked), self._blocks())
        return self.keep(number, {"pictures": asked, "log_partitions": partitions.cpu()}, started)

    def _blocks(self) -> Iterator[Tensor]:
        """Yield the pictures of all samples that can be read, mirrored ones after each block where they count."""
        for number in range(-(-self.pictures.rows // PICTURE_PART)):
            checkpoint()
            first = number * PICTURE_PART
            train_ids = np.arange(first, min(self.pictures.rows, first + PICTURE_PART))
            good = train_ids[~np.isin(train_ids, list(unreadable_pictures(self.pictures, train_ids)))]
            if len(good):
                yield from load_pictures(self.context, self.pictures, good)


class Nda:
    """The family of the nda teacher; see `tasks.teaching.families.Family`."""

    def check(self, context: Context) -> None:
        """Raise UsageError where a timestep is not of the model's schedule."""
        if (listed := context.config.teacher.timestep_list) is not None:
            plan = NoisePlan(seed=0, timesteps=listed, draws=context.config.teacher.draws)
            plan.timestep_values(train_timesteps(context.config.model.folder))

    def artifacts(self, context: Context, samples: Artifact, queries: Artifact) -> list[Artifact]:
        teacher, workspace = context.config.teacher, context.workspace
        side = teacher.patch_pixels or context.model_hash
        pictures = PictureParts.together(workspace, input_key("patch pictures", samples.key, side), samples.rows)
        science = teacher.timestep_list, teacher.draws, teacher.seed, teacher.patch_sizes
        key = input_key(
            "patch posteriors", pictures.key, queries.key, context.model_hash, *science, context.config.model.flips
        )
        return [pictures, PosteriorParts.together(workspace, key, queries.rows)]

    def parts(self, context: Context, artifacts: Artifacts) -> list[Parts]:
        pictures, posteriors = (artifacts[kind] for kind in (PictureParts.kind, PosteriorParts.kind))
        return [
            PictureParts(context, artifacts["samples"], pictures),
            PosteriorParts(context, pictures, artifacts["queries"], posteriors),
        ]

    def key(self, context: Context, artifacts: Artifacts) -> str:
        return artifacts[PosteriorParts.kind].key

    def shard_shape(self, config: PipelineConfig, queries: int) -> tuple[int, int | None]:
        return block_shape(config, queries)

    def scores(
        self, context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
    ) -> BlockScores:
        pictures = artifacts[PictureParts.kind]
        left_out = unreadable_pictures(pictures, train_ids)
        good = train_ids[~np.isin(train_ids, list(left_out))]
        plan, schedule = patch_plan(context)
        asked, partitions = load_posteriors(context, artifacts[PosteriorParts.kind], query_numbers)
        found = torch.zeros(len(query_numbers), len(good), dtype=torch.float64)
        for several in load_pictures(context, pictures, good):  # mirrored images after the images themselves
            found += patch_scores(plan, schedule, asked, partitions, several).cpu()
        return BlockScores(good, found, torch.full_like(found, torch.nan), left_out)

    def costs(self, config: PipelineConfig, size: Size) -> list[KindCost]:
        shards, _ = score_shards(config, size)
        return [
            KindCost(PictureParts.kind, -(-size.samples // PICTURE_PART), size.samples, 0.0),
            KindCost(PosteriorParts.kind, -(-size.queries // POSTERIOR_PART), size.queries, 0.0, unknown=True),
            KindCost("scores", shards, size.queries * size.candidates, 0.0, unknown=True),
        ]


def patch_plan(context: Context) -> tuple[PatchPlan, Schedule]:
    """Return the configured noise levels and patches, and the model's noise schedule."""
    teacher, folder = context.config.teacher, context.config.model.folder
    schedule = load_schedule(folder / "scheduler")
    timesteps = teacher.timestep_list or (round(PUBLISHED_NOISE * schedule.train_timesteps),)
    plan = PatchPlan(timesteps, teacher.patch_sizes, teacher.patch_matches, draws=teacher.draws, seed=teacher.seed)
    return plan, schedule


def picture_side(context: Context) -> int:
    """Return the pixels a side of the pictures that patches are cut from: the model's own where none are configured.

    A generated picture has no finer detail than the model's, and sharper samples would be unlike it for that alone.
    """
    return context.config.teacher.patch_pixels or min(MOST_PIXELS, *context.model().resolution)


def unreadable_pictures(pictures: Artifact, train_ids: NDArray[np.int64]) -> dict[int, str]:
    """Return which of these samples have no picture, and why."""
    numbers = np.unique(train_ids // PICTURE_PART).tolist()
    return quarantined_in((part(pictures.path, number, "safetensors") for number in numbers), train_ids.tolist())


def load_pictures(context: Context, pictures: Artifact, train_ids: NDArray[np.int64]) -> list[Tensor]:
    """Load samples' pictures in [-1, 1], (n, 3, side, side) on the device; a second time mirrored, with `model.flips`.

    `train_ids` are ascending.
    """
    numbers = train_ids // PICTURE_PART
    found: list[Tensor] = []
    for number in np.unique(numbers).tolist():
        rows = torch.from_numpy(train_ids[numbers == number] - number * PICTURE_PART)
        found.append(load_tensors(part(pictures.path, number, "safetensors"))["pictures"][rows])
    if not found:
        return []
    scaled = _scaled(context, torch.cat(found))
    return [scaled, scaled.flip(-1)] if context.config.model.flips else [scaled]


def load_posteriors(context: Context, posteriors: Artifact, query_numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Load the pictures of queries in [-1, 1], and their `log_partitions`, on the device."""
    tensors = {
        number: load_tensors(part(posteriors.path, number, "safetensors"))
        for number in sorted({query // POSTERIOR_PART for query in query_numbers})
    }
    pictures, partitions = (
        torch.stack([tensors[query // POSTERIOR_PART][name][query % POSTERIOR_PART] for query in query_numbers])
        for name in ("pictures", "log_partitions")
    )
    return _scaled(context, pictures), partitions.to(context.device)


def query_heat_maps(
    context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
) -> Tensor:
    """Return where in the queries' pictures the influence of samples lies, (queries, n, side, side) float64.

    Its mean over the picture is the score. `train_ids` are ascending, and of samples that have scores.
    """
    plan, schedule = patch_plan(context)
    asked, partitions = load_posteriors(context, artifacts[PosteriorParts.kind], query_numbers)
    several = load_pictures(context, artifacts[PictureParts.kind], train_ids)
    return torch.stack([heat_maps(plan, schedule, asked, partitions, each).cpu() for each in several]).sum(0)


def _small(images: list[Image.Image], side: int) -> Tensor:
    pixels = np.stack([np.asarray(square(image.convert("RGB"), side)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _scaled(context: Context, pictures: Tensor) -> Tensor:
    return pictures.to(context.device).float() / 127.5 - 1


FAMILY = Nda()
