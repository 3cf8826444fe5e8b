"""What a run is to do: which stages it has, where each lies or will, in which parts."""

from __future__ import annotations

from dataclasses import dataclass

from fastgda_core.teachers.registry import TEACHERS
from storage_schemas import tables
from storage_schemas.commit import input_key
from tasks.context import Context, Stage
from tasks.inputs.candidates import candidate_space
from tasks.inputs.features import feature_folders, features_key
from tasks.teaching.base_losses import base_losses_of
from tasks.teaching.curvature import curvature_of
from tasks.teaching.latents import latents_of
from tasks.teaching.run import RunInputs
from tasks.teaching.unlearning import updates_of


@dataclass(frozen=True)
class RunPlan:
    """A run that is planned, and the stages that were made to plan it."""

    inputs: RunInputs
    made: list[Stage]

    @property
    def run(self) -> str:
        return self.inputs.run


def stages_of(context: Context, samples: Stage, queries: Stage) -> dict[str, Stage]:
    """The stages that lead to scores, by name; their keys follow from the inputs, whether or not they are made yet."""
    latents = latents_of(context, samples)
    curvature = curvature_of(context, latents)
    updates = updates_of(context, latents, curvature, queries)
    found = [latents, curvature, updates]
    if not TEACHERS[context.config.teacher.name].first_order:
        found.append(base_losses_of(context, latents))
    return {stage.name: stage for stage in (samples, queries, *found)}


def run_name(context: Context, stages: dict[str, Stage]) -> str:
    """The configuration's name and a hash of everything that the run's scores depend on."""
    config = context.config
    # Where every sample is scored no feature has a say; the head's may then change and the scores stay.
    chosen_by = [] if config.candidates.policy == "all" else [features_key(candidate_space(context), stages["samples"])]
    science = config.candidates.science(), config.teacher.science()
    key = input_key(stages["unlearning steps"].key, *chosen_by, *science, table=tables.SCORES)
    return f"{config.name}-{key[:10]}"


def run_inputs(context: Context, stages: dict[str, Stage], candidates: Stage) -> RunInputs:
    """The run of these candidates."""
    run = candidates.key
    features = {
        f"features of samples {name}": Stage(name, key, folder, stages["samples"].rows, 0.0, True)
        for space in (candidate_space(context), context)
        for name, (folder, key) in feature_folders(space, stages["samples"]).items()
    }
    scores = Stage("scores", run, context.workspace.scores(run), candidates.rows, 0.0, True)
    return RunInputs(run, context, {**stages, **features, "candidates": candidates, "scores": scores})
