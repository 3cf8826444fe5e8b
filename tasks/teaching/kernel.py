"""The teachers of gradient features: latents, features of samples and queries, the kernel between them, then scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.diffusion.model import train_timesteps
from fastgda_core.errors import UsageError
from fastgda_core.teachers.kernel import STORED_BYTES
from fastgda_core.teachers.needs import GRADIENT_FORWARDS
from storage_schemas.commit import input_key
from storage_schemas.listings import quarantined_in
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.parts import Parts
from tasks.teaching.cost import KindCost, Size, block_shape, score_shards
from tasks.teaching.families import Artifacts, BlockScores
from tasks.teaching.kernel_parts import (
    ASKED,
    FEATURES,
    KERNEL,
    AskedParts,
    FeatureParts,
    KernelParts,
    kernel_teacher,
)
from tasks.teaching.latents import LatentParts, latents_of
from tasks.teaching.noise import noise_plan


class KernelFamily:
    """The family of the teachers of gradient features; see `tasks.teaching.families.Family`."""

    def check(self, context: Context) -> None:
        """Raise UsageError where the plan does not fit the schedule, or a journey or a checkpoint is not to be had."""
        config, method = context.config, kernel_teacher(context.config)
        noise_plan(config).timestep_values(train_timesteps(config.model.folder))
        if len(config.teacher.checkpoints) > 1 and not method.summed_over_checkpoints:
            raise UsageError(
                f"teacher.checkpoints has {len(config.teacher.checkpoints)} folders and teacher {config.teacher.name} "
                "looks at one: name one, or none for the model's own weights"
            )
        if method.journey and config.queries.captions is None:
            raise UsageError(
                f"teacher {config.teacher.name} follows how queries were generated, which pictures of queries.shards "
                "do not tell: give queries.captions, or take teacher trak"
            )

    def artifacts(self, context: Context, samples: Artifact, queries: Artifact) -> list[Artifact]:
        config, latents = context.config.teacher, latents_of(context, samples)
        method, made = kernel_teacher(context.config), [latents]
        # Without the name: trak and journey_trak share the samples' features.
        science = (method.objective, method.each_timestep, config.projection or method.dimensions)
        common = (*science, config.layers, config.precision, config.seed)
        for here in context.at_checkpoints():
            plan = noise_plan(context.config)
            key = input_key(FEATURES, latents.key, *common, plan, config.shard_samples, *here.taught_at)
            features = FeatureParts.together(context.workspace, key, latents.rows)
            key = input_key(
                ASKED, queries.key, method.journey, context.model_hash, *common, *here.taught_at,
                *([plan] if method.each_timestep else [config.gradient_pairs]),
            )  # fmt: skip
            asked = AskedParts.together(context.workspace, key, queries.rows)
            made += [replace(each, name=here.named(each.name)) for each in (features, asked)]
        if method.ridge is not None:
            key = input_key(KERNEL, made[1].key, made[2].key, config.ridge)
            made.append(KernelParts.together(context.workspace, key, queries.rows))
        return made

    def parts(self, context: Context, artifacts: Artifacts) -> list[Parts]:
        parts: list[Parts] = [LatentParts(context, artifacts["samples"], artifacts["latents"])]
        for features, asked in _at_checkpoints(context, artifacts):
            parts += [features, asked]
        if KERNEL in artifacts:
            parts.append(_kernel_parts(context, artifacts))
        return parts

    def key(self, context: Context, artifacts: Artifacts) -> str:
        kinds = [each.artifact.key for both in _at_checkpoints(context, artifacts) for each in both]
        return input_key("kernel scores", *kinds, *([artifacts[KERNEL].key] if KERNEL in artifacts else []))

    def shard_shape(self, config: PipelineConfig, queries: int) -> tuple[int, int | None]:
        return block_shape(config, queries)

    def scores(
        self, context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
    ) -> BlockScores:
        method, config = kernel_teacher(context.config), context.config.teacher
        good, left_out = train_ids, dict[int, str]()
        several = _at_checkpoints(context, artifacts)
        for features, _ in several:
            left_out |= _left_out(features, train_ids)
        good = train_ids[~np.isin(train_ids, list(left_out))]
        blocks = [
            query_numbers[first : first + config.loaded_queries]
            for first in range(0, len(query_numbers), config.loaded_queries)
        ]
        scores = torch.zeros(len(query_numbers), len(good), dtype=torch.float64)
        for features, asked in several:
            source: AskedParts | KernelParts = _kernel_parts(context, artifacts) if KERNEL in artifacts else asked
            phi = _of_samples(features, good)
            if len(good):
                scores += torch.cat([method.scores(source.load(numbers), phi).cpu() for numbers in blocks])
        return BlockScores(good, scores, torch.full_like(scores, torch.nan), left_out)

    def costs(self, config: PipelineConfig, size: Size) -> list[KindCost]:
        teacher, method = config.teacher, kernel_teacher(config)
        timesteps = teacher.timestep_count
        noises = timesteps * teacher.draws
        of_sample = noises * config.model.images * size.captions * GRADIENT_FORWARDS
        of_query = (noises if method.each_timestep else teacher.gradient_pairs) * GRADIENT_FORWARDS
        if method.journey:
            of_query += 2 * config.queries.steps
        numbers = (teacher.projection or method.dimensions) * (timesteps if method.each_timestep else 1)
        parts = -(-size.samples // teacher.shard_samples)
        kept = size.samples * config.model.images * numbers * STORED_BYTES
        costs = []
        for features, asked in zip(teacher.at_checkpoints(FEATURES), teacher.at_checkpoints(ASKED), strict=True):
            costs.append(KindCost(features, parts, size.samples, size.samples * of_sample, kept))
            costs.append(KindCost(asked, size.queries, size.queries, size.queries * of_query))
        if method.ridge is not None:
            costs.append(KindCost(KERNEL, 1, size.queries, 0.0, unknown=True))  # products and a solve, no forward pass
        shards, _ = score_shards(config, size)
        return [*costs, KindCost("scores", shards, size.queries * size.candidates, 0.0)]


def _at_checkpoints(context: Context, artifacts: Artifacts) -> list[tuple[FeatureParts, AskedParts]]:
    return [
        (
            FeatureParts(here, artifacts["latents"], artifacts[here.named(FEATURES)]),
            AskedParts(here, artifacts["queries"], artifacts[here.named(ASKED)]),
        )
        for here in context.at_checkpoints()
    ]


def _kernel_parts(context: Context, artifacts: Artifacts) -> KernelParts:
    ((features, asked),) = _at_checkpoints(context, artifacts)
    return KernelParts(features, asked, artifacts[KERNEL])


def _left_out(features: FeatureParts, train_ids: NDArray[np.int64]) -> dict[int, str]:
    """Return which samples have no feature, and why."""
    wanted = set(train_ids.tolist())
    numbers = sorted({train_id // features.step for train_id in wanted})
    paths = (features.path(number) for number in numbers)
    return quarantined_in(paths, train_ids.tolist())


def _of_samples(features: FeatureParts, train_ids: NDArray[np.int64]) -> Tensor:
    """Return the features of some samples, ascending, (n, flips, d) float32."""
    found = []
    for number in np.unique(train_ids // features.step).tolist():
        there, values = features.load(number)
        if not len(there):  # all of the part were left out
            continue
        found.append(values[torch.from_numpy(np.isin(there, train_ids)).to(values.device)])
    return torch.cat(found) if found else torch.empty(0, 1, 0)


FAMILY = KernelFamily()
