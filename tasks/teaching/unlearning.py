"""The unlearning teachers: latents, curvature, one unlearning step a query, base losses where exact, then scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.diffusion.model import train_timesteps
from fastgda_core.sketches.int8 import bytes_of
from fastgda_core.teachers.registry import UNLEARNING_TEACHERS, UnlearningTeacher
from storage_schemas.commit import input_key
from storage_schemas.runs.noise_plan import NOISE_PLAN
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.base_losses import (
    BASE_LOSS_PART,
    BaseLossParts,
    base_losses_of,
    load_base_losses,
    without_base_loss,
)
from tasks.teaching.cost import KindCost, Size, block_shape, score_shards
from tasks.teaching.curvature import CurvatureParts, curvature_of, pilot_rows
from tasks.teaching.families import Artifacts, BlockScores
from tasks.teaching.latents import LatentParts, latents_of, load_block, unreadable_samples
from tasks.teaching.noise import noise_plan, planned, run_plan
from tasks.teaching.noise_pilot import DEAREST, PILOT_FORWARDS, PILOT_SAMPLES, PlanParts, pilot_plan_of
from tasks.teaching.parts import Parts
from tasks.teaching.sketches import BasisParts, SketchParts, basis_of, sketches_of
from tasks.teaching.updates import QueryUpdates, UpdateParts, updates_of

GRADIENT_FORWARDS = 2.1  # one forward and backward to the chosen layers, in forwards (benchmarks/RESULTS.md)
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
        curvature = curvature_of(context, latents)
        updates = updates_of(context, latents, curvature, queries)
        made, plan = [latents, curvature, updates], None
        if context.config.teacher.agreement is not None:
            plan = pilot_plan_of(context, updates)
            made.append(plan)
        if not unlearning_teacher(context.config).first_order:
            made.append(base_losses_of(context, latents, plan))
        if context.config.sketches is not None:
            basis = basis_of(context, updates, plan)
            made += [basis, sketches_of(context, latents, basis)]
        return made

    def parts(self, context: Context, artifacts: Artifacts) -> list[Parts]:
        latents, curvature, updates = (artifacts[name] for name in ("latents", "curvature", "unlearning steps"))
        parts: list[Parts] = [
            LatentParts(context, artifacts["samples"], latents),
            CurvatureParts(context, latents, curvature),
            UpdateParts(context, latents, curvature, artifacts["queries"], updates),
        ]
        plan = artifacts.get(NOISE_PLAN)
        if plan is not None:
            parts.append(PlanParts(context, latents, artifacts["queries"], updates, plan))
        if "base losses" in artifacts:
            parts.append(BaseLossParts(context, latents, artifacts["base losses"], plan))
        sketches = SketchParts.of_run(context, artifacts)
        if sketches is not None:
            parts.append(BasisParts(context, latents, curvature, artifacts["queries"], updates, sketches.basis, plan))
            parts.append(sketches)
        return parts

    def key(self, context: Context, artifacts: Artifacts) -> str:
        updates, plan = artifacts["unlearning steps"], artifacts.get(NOISE_PLAN)
        return updates.key if plan is None else input_key(updates.key, plan.key)

    def shard_shape(self, config: PipelineConfig, queries: int) -> tuple[int, int | None]:
        """Return one query and all its candidates where scores are exact, else a block of queries and of samples."""
        if not unlearning_teacher(config).first_order:
            return 1, None
        return block_shape(config, queries)

    def scores(
        self, context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
    ) -> BlockScores:
        latents, updates, base_losses = (artifacts.get(name) for name in ("latents", "unlearning steps", "base losses"))
        assert latents is not None and updates is not None
        known = unreadable_samples(latents, train_ids.tolist())
        if base_losses is not None:
            known |= without_base_loss(context, base_losses, train_ids)
        sketches = SketchParts.of_run(context, artifacts)
        beside = sketches.beside(train_ids) if sketches else None

        def of_samples(chosen: NDArray[np.int64]) -> Tensor:
            model, block = context.teacher_model(), load_block(context, latents, chosen.tolist())
            base = None
            if base_losses is not None:
                base = load_base_losses(context, base_losses).of(block).to(context.device)
            if beside is not None:
                beside.begin()
            scores = unlearning_teacher(context.config).scores(
                model,
                context.layers(model),
                run_plan(context, artifacts.get(NOISE_PLAN)),
                block,
                QueryUpdates(context, updates, query_numbers, context.config.teacher.loaded_queries),
                base,
                context.micro_batch("gradients" if base is None else "losses"),
                *([beside.look] if beside is not None else []),
            )
            return torch.stack(scores).cpu()

        nothing = torch.empty(2, len(query_numbers), 0, dtype=torch.float64)
        good, (values, errors), left_out = without_bad_samples(train_ids, known, of_samples, nothing)
        block = BlockScores(good, values, errors, left_out)
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
        timesteps = len(teacher.timestep_list) if teacher.timestep_list is not None else teacher.timesteps
        noises = timesteps * teacher.draws * config.model.images * size.captions
        rows, pilot = config.curvature.samples, pilot_rows(config.curvature) * GRADIENT_FORWARDS
        costs = [
            KindCost("curvature", 1, rows, rows * FISHER_FORWARDS[method.fisher] + pilot),
            KindCost("unlearning steps", queries, queries, queries * teacher.gradient_pairs * GRADIENT_FORWARDS),
            *pilot_costs,
        ]
        pairs = queries * size.candidates
        if not method.first_order:
            samples, parts = size.samples, -(-size.samples // BASE_LOSS_PART)
            costs.append(KindCost("base losses", parts, samples, samples * noises))
            return [*costs, KindCost("scores", queries, pairs, pairs * noises)]
        shards, seen = score_shards(config, size)
        one = noises * GRADIENT_FORWARDS
        scores = KindCost("scores", shards, pairs, seen * one)
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


FAMILY = Unlearning()
