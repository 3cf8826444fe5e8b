"""The unlearning teachers: latents, curvature, one unlearning step a query, base losses where exact, then scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.diffusion.model import train_timesteps
from fastgda_core.sketches.int8 import bytes_of
from fastgda_core.teachers.needs import GRADIENT_FORWARDS
from fastgda_core.teachers.registry import UNLEARNING_TEACHERS, UnlearningTeacher
from storage_schemas.commit import input_key
from storage_schemas.runs.noise_plan import NOISE_PLAN
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.parts import Parts
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.base_losses import (
    BASE_LOSS_PART,
    BaseLossParts,
    base_losses_of,
    load_base_losses,
    without_base_loss,
)
from tasks.teaching.checkpoints import Asked, at_checkpoints, summed_scores
from tasks.teaching.cost import KindCost, Size, block_shape, score_shards
from tasks.teaching.curvature import CurvatureParts, curvature_of, pilot_rows
from tasks.teaching.families import Artifacts, BlockScores
from tasks.teaching.latents import LatentParts, blocks_ahead, latents_of, unreadable_samples
from tasks.teaching.noise import noise_plan, planned, run_plan
from tasks.teaching.noise_pilot import DEAREST, PILOT_FORWARDS, PILOT_SAMPLES, PlanParts, pilot_plan_of
from tasks.teaching.sketches import BasisParts, SketchBeside, SketchParts, basis_of, sketches_of
from tasks.teaching.updates import UpdateParts, updates_of

# Of one row, in forwards: kronfluence's pass; for EK-FAC a pass for the eigenvalues after it.
FISHER_FORWARDS = {"diagonal": 3.0, "ekfac": 3.0 + GRADIENT_FORWARDS}


def unlearning_teacher(config: PipelineConfig) -> UnlearningTeacher:
    """Return the configured teacher, one of this family."""
    return UNLEARNING_TEACHERS[config.teacher.name]


class Unlearning:
    """The family of the unlearning teachers; see `tasks.teaching.families.Family`."""

    def check(self, context: Context) -> None:
        """Raise UsageError where the noise plan does not fit the model's schedule."""
        if context.config.teacher.agreement is None:  # a pilot's plan is made of the schedule that there is
            noise_plan(context.config).timestep_values(train_timesteps(context.config.model.folder))

    def artifacts(self, context: Context, samples: Artifact, queries: Artifact) -> list[Artifact]:
        latents = latents_of(context, samples)
        made: list[Artifact] = [latents]
        plan: Artifact | None = None
        for here in context.at_checkpoints():
            curvature = curvature_of(here, latents)
            updates = updates_of(here, latents, curvature, queries)
            made += [curvature, updates]
            if context.config.teacher.agreement is not None:  # there is one checkpoint then
                plan = pilot_plan_of(context, updates)
                made.append(plan)
            if not unlearning_teacher(context.config).first_order:
                made.append(base_losses_of(here, latents, plan))
        if context.config.sketches is not None:
            basis = basis_of(context, updates, plan)
            made += [basis, sketches_of(context, latents, basis)]
        return made

    def parts(self, context: Context, artifacts: Artifacts) -> list[Parts]:
        latents, queries, plan = artifacts["latents"], artifacts["queries"], artifacts.get(NOISE_PLAN)
        parts: list[Parts] = [LatentParts(context, artifacts["samples"], latents)]
        for at in at_checkpoints(context, artifacts):
            parts.append(CurvatureParts(at.context, latents, at.curvature))
            parts.append(UpdateParts(at.context, latents, at.curvature, queries, at.updates))
            if plan is not None:
                parts.append(PlanParts(context, latents, queries, at.updates, plan))
            if at.base_losses is not None:
                parts.append(BaseLossParts(at.context, latents, at.base_losses, plan))
        sketches = SketchParts.of_run(context, artifacts)
        if sketches is not None:
            curvature, updates = artifacts["curvature"], artifacts["unlearning steps"]
            parts.append(BasisParts(context, latents, curvature, queries, updates, sketches.basis, plan))
            parts.append(sketches)
        return parts

    def key(self, context: Context, artifacts: Artifacts) -> str:
        keys, plan = [at.updates.key for at in at_checkpoints(context, artifacts)], artifacts.get(NOISE_PLAN)
        taught_by = keys[0] if len(keys) == 1 else input_key("checkpoints", keys)
        return taught_by if plan is None else input_key(taught_by, plan.key)

    def shard_shape(self, config: PipelineConfig, queries: int) -> tuple[int, int | None]:
        """Return one query and all its candidates where scores are exact, else a block of queries and of samples."""
        if not unlearning_teacher(config).first_order:
            return 1, None
        return block_shape(config, queries)

    def scores(
        self, context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
    ) -> BlockScores:
        at_a_time = context.config.teacher.loaded_queries
        asked = [at.asked(query_numbers, at_a_time) for at in at_checkpoints(context, artifacts)]
        sketches = SketchParts.of_run(context, artifacts)
        beside = sketches.beside(train_ids) if sketches else None
        block = scores_of(context, artifacts, asked, len(query_numbers), train_ids, beside)
        if beside is not None:
            beside.commit(block.train_ids, block.left_out)
        return block

    def costs(self, config: PipelineConfig, size: Size) -> list[KindCost]:
        pilot_costs = []
        if config.teacher.agreement is not None:
            chosen_by = min(PILOT_SAMPLES, size.samples)
            forwards = chosen_by * PILOT_FORWARDS * config.model.images * size.captions * GRADIENT_FORWARDS
            pilot_costs = [KindCost(NOISE_PLAN, 1, chosen_by, forwards)]
            config = planned(config, *DEAREST)
        teacher, method, queries = config.teacher, unlearning_teacher(config), size.queries
        noises = teacher.timestep_count * teacher.draws * config.model.images * size.captions
        rows, pilot = config.curvature.samples, pilot_rows(config.curvature) * GRADIENT_FORWARDS
        before = [
            KindCost("curvature", 1, rows, rows * FISHER_FORWARDS[method.fisher] + pilot),
            KindCost("unlearning steps", queries, queries, queries * teacher.gradient_pairs * GRADIENT_FORWARDS),
            *pilot_costs,
        ]
        if not method.first_order:
            parts = -(-size.samples // BASE_LOSS_PART)
            before.append(KindCost("base losses", parts, size.samples, size.samples * noises))
        places = len(teacher.at_checkpoints(""))
        costs = [
            replace(cost, kind=teacher.at_checkpoints(cost.kind)[place]) for place in range(places) for cost in before
        ]
        pairs = queries * size.candidates
        if not method.first_order:
            return [*costs, KindCost("scores", queries, pairs, places * pairs * noises)]
        shards, seen = score_shards(config, size)
        one = noises * GRADIENT_FORWARDS
        scores = KindCost("scores", shards, pairs, places * seen * one)
        if config.sketches is None:
            return [*costs, scores]
        chosen, samples = min(config.sketches.pilot, size.samples), size.samples
        parts = -(-samples // config.teacher.shard_samples)
        # Where all samples are scored sketches are made of the gradients that scores are made of.
        forwards = 0.0 if config.candidates.policy == "all" else samples * one
        kept = samples * config.model.images * bytes_of(config.sketches.size)
        return [
            *costs,
            KindCost("sketch basis", 1, chosen, chosen * one),
            scores,
            KindCost("sketches", parts, samples, forwards, kept),
        ]


def scores_of(
    context: Context,
    artifacts: Artifacts,
    asked: Sequence[Asked],
    queries: int,
    train_ids: NDArray[np.int64],
    beside: SketchBeside | None = None,
) -> BlockScores:
    """Return the scores of a block of training samples, ascending, against queries whose steps are at hand.

    Args:
        asked: steps of so many queries at each of the run's checkpoints.
        beside: what makes sketches of the gradients on the way.
    """
    latents, teacher = artifacts["latents"], unlearning_teacher(context.config)
    several = at_checkpoints(context, artifacts)
    stored = [at.base_losses for at in several if at.base_losses is not None]
    known = unreadable_samples(latents, train_ids.tolist())
    for base_losses in stored:
        known |= without_base_loss(context, base_losses, train_ids)

    def of_samples(chosen: NDArray[np.int64]) -> Tensor:
        if beside is not None:
            beside.begin()
        found = []
        for block in blocks_ahead(context, latents, chosen.tolist()):
            base = [load_base_losses(context, each).of(block).to(context.device) for each in stored]
            scores = summed_scores(
                teacher,
                asked,
                run_plan(context, artifacts.get(NOISE_PLAN)),
                block,
                base_losses=base,
                look=beside.look if beside is not None else None,
            )
            found.append(torch.stack([scores.values, scores.errors]).cpu())
        return torch.cat(found, dim=2)

    nothing = torch.empty(2, queries, 0, dtype=torch.float64)
    good, (values, errors), left_out = without_bad_samples(train_ids, known, of_samples, nothing)
    return BlockScores(good, values, errors, left_out)


FAMILY = Unlearning()
