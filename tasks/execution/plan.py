"""The plan of a run: its stages, where each is kept, in which parts."""

from __future__ import annotations

from collections.abc import Sequence

from storage_schemas import tables
from storage_schemas.commit import input_key
from tasks.artifact import Artifact, Made
from tasks.context import Context
from tasks.inputs.candidates import candidate_space, candidates_key
from tasks.inputs.features import feature_folders
from tasks.teaching.families import family_of
from tasks.teaching.latents import latents_of
from tasks.teaching.retrainings import judged_by
from tasks.teaching.run import Run


def run_artifacts(context: Context, samples: Artifact, queries: Artifact) -> dict[str, Artifact]:
    """Return the artifacts that lead to scores, by name; keys follow from the inputs, also before they are made."""
    made = family_of(context.config).artifacts(context, samples, queries)
    return {artifact.name: artifact for artifact in (samples, queries, *made)}


def run_name(context: Context, artifacts: dict[str, Artifact]) -> str:
    """Return the configuration's name with a hash of everything that the run's scores depend on."""
    config = context.config
    chosen_by = candidates_key(context, artifacts["samples"], artifacts["queries"])
    science = config.candidates.science(), config.teacher.science()
    taught_by = family_of(config).key(context, artifacts)
    return f"{config.name}-{input_key(taught_by, *chosen_by, *science, table=tables.SCORES)[:10]}"


def planned_run(context: Context, artifacts: dict[str, Artifact], candidates: Artifact, planned: Sequence[Made]) -> Run:
    """The run of these candidates."""
    name = candidates.key
    features = {
        f"features of samples {encoder}": Artifact(encoder, key, folder, artifacts["samples"].rows)
        for space in ([context] if context.config.candidates.index else [candidate_space(context), context])
        for encoder, (folder, key) in feature_folders(space, artifacts["samples"]).items()
    }
    scores = Artifact("scores", name, context.workspace.scores(name), candidates.rows)
    found = {**artifacts, **features, "candidates": candidates, "scores": scores}
    if (judge := context.config.judge) is not None:
        latents = found.setdefault("latents", latents_of(context, artifacts["samples"]))
        found |= judged_by(context, judge, latents, artifacts["queries"], name)
    return Run(context, found, planned)
