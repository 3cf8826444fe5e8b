"""What a run is to do: which stages it has, where each lies or will, in which parts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from fastgda_core.diffusion.model import model_hash, train_timesteps
from fastgda_core.diffusion.weights import check_weights
from fastgda_core.teachers.teachers import TEACHERS
from storage_schemas import tables
from storage_schemas.commit import input_key
from storage_schemas.errors import StoreError
from storage_schemas.files import Stamps, stamps
from storage_schemas.liveness import Beat, read_assignment, withdraw, write_assignment
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.candidates import candidate_space
from tasks.config import PipelineConfig
from tasks.context import Context, Stage
from tasks.cost import Size, costs, known_rate, mean_captions
from tasks.curvature import curvature_of
from tasks.features import feature_folders, features_key
from tasks.make_parts import Makers
from tasks.progress import console
from tasks.run_inputs import RunInputs
from tasks.run_status import others_at_work
from tasks.samples import latents_of
from tasks.score_plan import store_plan
from tasks.teacher import base_losses_of, noise_plan
from tasks.unlearning import updates_of


@dataclass(frozen=True)
class RunPlan:
    """A run that is planned, and the stages that were made to plan it."""

    inputs: RunInputs
    made: list[Stage]

    @property
    def run(self) -> str:
        return self.inputs.run


def open_context(config: PipelineConfig) -> Context:
    """The context of a configuration.

    Raises:
        UsageError: its model, the weights of it or its noise plan cannot be used; before any work.
    """
    check_weights(config.model.folder)
    files = sorted(path for path in config.model.folder.rglob("*") if path.is_file())
    context = Context(config, _model_hash(config.model.folder, stamps(files)))
    noise_plan(config).timestep_values(train_timesteps(config.model.folder))
    return context


@functools.lru_cache(maxsize=4)
def _model_hash(folder: Path, _files: Stamps) -> str:
    """Gigabytes are read once per process, however many flows ask, as long as no file changes."""
    return model_hash(folder)


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


@task(task_run_name="plan", cache_policy=NO_CACHE)
def begin_run(inputs: RunInputs) -> Makers:
    """Write down the plan, once, and what workers are to do now; a wish to stop that is left over is withdrawn."""
    workspace, run, context = inputs.workspace, inputs.run, inputs.context
    origin = flow_run.get_id() or ""
    if not workspace.run(run).exists():
        store_plan(context, inputs.score_run, inputs.stages, origin)
    assignment = inputs.assignment(_generation(workspace, run), origin)
    write_assignment(workspace, assignment)
    withdraw(workspace, run)
    _tell_of_others(workspace, run, others_at_work(workspace, run))
    return Makers(inputs, assignment.key, _part_seconds(inputs))


def _tell_of_others(workspace: Workspace, run: str, others: list[Beat]) -> None:
    # Not in the task itself: what a flow calls goes to worker processes with it, and a console cannot be sent.
    if not others:
        return
    at = [f"{beat.worker} at {beat.kind} {beat.number:05d}" for beat in others if beat.kind]
    who = (at or [beat.worker for beat in others])[0]
    console.print(
        f"run {run} is under way elsewhere, too: {who}, of {len(others)} at work; this one begins at the other end, "
        f"and {command(workspace, f'cancel {run}')} stops all",
        highlight=False,
        soft_wrap=True,
    )


def _generation(workspace: Workspace, run: str) -> int:
    try:
        return read_assignment(workspace, run).generation
    except StoreError:
        return 0


def _part_seconds(inputs: RunInputs) -> dict[str, float]:
    """Estimate of what one part of each kind takes; empty where nothing is known, which the first parts mend."""
    speed = known_rate(inputs.context)
    if speed is None:
        return {}
    samples, queries = inputs.stages["samples"], inputs.stages["queries"]
    candidates = inputs.stages["candidates"].rows // max(1, queries.rows)
    size = Size(samples.rows, mean_captions(samples.path), queries.rows, candidates)
    per_second = speed.forwards_per_second
    return {cost.kind: cost.seconds(per_second) / cost.parts for cost in costs(inputs.context.config, size)}
