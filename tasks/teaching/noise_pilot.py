"""The pilot that chooses a run's noise plan by the agreement that its configuration asks for."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.diffusion.model import train_timesteps
from fastgda_core.diffusion.objective import Objective
from fastgda_core.errors import UsageError
from fastgda_core.teachers.noise_pilot import (
    LADDER_DRAWS,
    LADDER_TIMESTEPS,
    PILOT_DRAWS,
    PILOT_GRID,
    Rung,
    cheapest,
    ladder,
    pilot_scores,
    pilot_timesteps,
)
from storage_schemas.commit import Manifest, commit, input_key
from storage_schemas.runs.noise_plan import NOISE_PLAN, Expected, NoisePlanRecord
from storage_schemas.tables import PSEUDO, TWIN
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.inputs.queries import load_queries
from tasks.parts import Parts
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.noise import noise_plan, planned
from tasks.teaching.updates import QueryUpdates

PILOT_SAMPLES = 128
PILOT_FORWARDS = PILOT_GRID * PILOT_DRAWS  # of one caption and image
# Timesteps and draws at the ladder's ends, for an estimate, where only their numbers count.
CHEAPEST = [0] * LADDER_TIMESTEPS[0], LADDER_DRAWS[0]
DEAREST = [0] * LADDER_TIMESTEPS[-1], LADDER_DRAWS[-1]


def pilot_plan_of(context: Context, updates: Artifact) -> Artifact:
    """Return the artifact of the plan that a pilot chooses, which need not be made yet.

    Ties of scores that are not above 0 count in the agreement, so `teacher.negatives` has a part in the choice.
    """
    teacher = context.config.teacher
    key = input_key(NOISE_PLAN, updates.key, teacher.agreement, teacher.negatives, PILOT_SAMPLES, PILOT_FORWARDS)
    return PlanParts.together(context.workspace, key, PILOT_SAMPLES)


class PlanParts(Parts):
    """The noise plan, chosen by the scores of some random samples against all queries but those of the twin test."""

    kind = NOISE_PLAN
    title = "noise plan"
    suffix = "json"

    def __init__(
        self, context: Context, latents: Artifact, queries: Artifact, updates: Artifact, chosen: Artifact
    ) -> None:
        self.context, self.latents, self.queries, self.updates = context, latents, queries, updates
        self.artifact = chosen

    @property
    def count(self) -> int:
        return 1

    def rows(self, number: int) -> int:
        return min(self.artifact.rows, self.latents.rows)

    def make(self, number: int) -> Manifest:
        """Score the pilot and commit the cheapest plan that is expected to agree as well as is asked.

        Raises:
            UsageError: no plan of the ladder is.
        """
        context, teacher, started = self.context, self.context.config.teacher, time.monotonic()
        asked = teacher.agreement
        assert asked is not None
        several = [each for each, query in enumerate(load_queries(self.queries)) if query.split not in (TWIN, PSEUDO)]
        scores = self._scores(several)
        tied, common = teacher.negatives == "tie", teacher.objective is Objective.ratio
        rungs = ladder(scores, train_timesteps(context.config.model.folder), tied=tied, common=common)
        chosen = cheapest(rungs, asked)
        if chosen is None:
            best = max(rungs, key=lambda rung: rung.of_schedule)
            raise UsageError(
                f"teacher.agreement is {asked:g}, but by the pilot no noise plan of up to {rungs[-1].forwards} "
                f"forwards a caption is expected to agree better than {best.of_schedule:.2f}: lower it, or choose "
                "another teacher.objective"
            )
        record = NoisePlanRecord(
            asked=asked,
            chosen=_expected(chosen),
            samples=len(scores),
            queries=len(several),
            ladder=[_expected(rung) for rung in rungs],
        )

        def write(path: Path) -> None:
            path.write_text(record.model_dump_json(indent=2))

        path, key, device = self.path(number), self.key(number), str(context.device)
        return commit(path, write, key=key, rows=len(scores), started=started, device=device)

    def _scores(self, queries: list[int]) -> Tensor:
        """Return the scores of the pilot's samples that can be read, as `pilot_scores` has them."""
        context, teacher = self.context, self.context.config.teacher
        draw = np.random.default_rng(teacher.seed)
        train_ids = np.sort(draw.choice(self.latents.rows, self.rows(0), replace=False))

        def of_samples(chosen: NDArray[np.int64]) -> Tensor:
            model, block = context.teacher_model(), load_block(context, self.latents, chosen.tolist())
            updates = QueryUpdates(context, self.updates, queries, teacher.loaded_queries)
            grid = pilot_timesteps(model.schedule.train_timesteps)
            plan = noise_plan(planned(context.config, grid, PILOT_DRAWS))
            micro_batch = context.micro_batch("gradients")
            return pilot_scores(model, context.layers(model), plan, block, updates, micro_batch)

        known = unreadable_samples(self.latents, train_ids.tolist())
        good, scores, _ = without_bad_samples(train_ids, known, of_samples, torch.empty(0))
        if len(good) < 2:
            raise UsageError(
                "teacher.agreement needs samples to choose a noise plan by, and the pilot's cannot be used"
            )
        return scores


def _expected(rung: Rung) -> Expected:
    return Expected(
        timesteps=list(rung.timesteps), draws=rung.draws, agreement=rung.agreement, of_schedule=rung.of_schedule
    )
