"""The noise plan of the unlearning teachers."""

from __future__ import annotations

from fastgda_core.diffusion.noise import CommonNoisePlan, NoisePlan
from fastgda_core.diffusion.objective import Objective
from tasks.config.pipeline import PipelineConfig


def noise_plan(config: PipelineConfig, seed: int | None = None) -> NoisePlan:
    """Return the run's noise plan, or the same plan with other noise."""
    teacher = config.teacher
    kind = CommonNoisePlan if teacher.objective is Objective.ratio else NoisePlan
    return kind(
        seed=teacher.seed if seed is None else seed,
        timesteps=teacher.timestep_list or teacher.timesteps,
        draws=teacher.draws,
        first_timestep=teacher.first_timestep,
        weights=teacher.timestep_weights,
        antithetic=teacher.antithetic,
    )
