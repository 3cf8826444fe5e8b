"""The noise plan of the unlearning teachers: as configured, or as a pilot chose it."""

from __future__ import annotations

from collections.abc import Sequence

from fastgda_core.diffusion.noise import CommonNoisePlan, NoisePlan
from fastgda_core.diffusion.objective import Objective
from fastgda_core.errors import UsageError
from storage_schemas.runs.noise_plan import NOISE_PLAN, read_noise_plan
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context


def noise_plan(config: PipelineConfig, seed: int | None = None) -> NoisePlan:
    """Return the configured noise plan, or the same plan with other noise.

    Raises:
        UsageError: the plan is a pilot's to choose; `run_plan` has that of a run.
    """
    teacher = config.teacher
    if teacher.agreement is not None:
        raise UsageError("teacher.agreement lets a run's pilot choose the noise plan: give teacher.timesteps instead")
    kind = CommonNoisePlan if teacher.objective is Objective.ratio else NoisePlan
    return kind(
        seed=teacher.seed if seed is None else seed,
        timesteps=teacher.timestep_list or teacher.timesteps,
        draws=teacher.draws,
        first_timestep=teacher.first_timestep,
        weights=teacher.timestep_weights,
        antithetic=teacher.antithetic,
    )


def run_plan(context: Context, chosen: Artifact | None, seed: int | None = None) -> NoisePlan:
    """Return the noise plan of a run, or the same plan with other noise.

    `chosen` is the artifact of what the run's pilot chose, made by now; None where the plan is the configured one.
    """
    if chosen is None:
        return noise_plan(context.config, seed)
    record = context.loaded.once(NOISE_PLAN, chosen, lambda: read_noise_plan(chosen.path))
    return noise_plan(planned(context.config, record.chosen.timesteps, record.chosen.draws), seed)


def plan_inputs(context: Context, chosen: Artifact | None) -> object:
    """Return what the keys of things depend on that are made under the run's noise plan."""
    return noise_plan(context.config) if chosen is None else chosen.key


def planned(config: PipelineConfig, timesteps: Sequence[int], draws: int) -> PipelineConfig:
    """Return the configuration with a plan of the pilot's in place of the agreement that it asks for."""
    plan = {"timestep_list": tuple(timesteps), "draws": draws, "antithetic": draws > 1}
    teacher = config.teacher.model_copy(update={"agreement": None, **plan})
    return config.model_copy(update={"teacher": teacher})
