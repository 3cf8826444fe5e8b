"""A run: as its coordinator plans it, and as a worker process reads it from the workspace."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from storage_schemas.runs.liveness import Assignment, read_assignment
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.config.stored import lifted
from tasks.context import Context
from tasks.parts import Parts
from tasks.teaching.families import family_of
from tasks.teaching.latents import LatentParts
from tasks.teaching.preparation import Preparation, assignment_of
from tasks.teaching.retrainings import REMOVAL_PLAN, RemovalParts, RetrainingParts
from tasks.teaching.score_plan import ScoreRun
from tasks.teaching.scores import ScoreParts


@dataclass(frozen=True, eq=False)
class Run:
    """A run with its configuration.

    artifacts: where each lies, or will, by name; planned: what was made to plan the run, in the process that did.
    """

    context: Context
    artifacts: dict[str, Artifact]
    planned: Sequence[Made] = ()

    @property
    def name(self) -> str:
        return self.artifacts["scores"].key

    @property
    def config(self) -> PipelineConfig:
        return self.context.config

    @property
    def workspace(self) -> Workspace:
        return self.context.workspace

    @functools.cached_property
    def parts(self) -> dict[str, Parts]:
        """The parts that the run is made of, by kind, in the order in which it is made."""
        made: list[Parts] = [*family_of(self.config).parts(self.context, self.artifacts), self.scores]
        if RetrainingParts.kind in self.artifacts:
            samples, latents = self.artifacts["samples"], self.artifacts["latents"]
            if all(parts.kind != LatentParts.kind for parts in made):  # of a teacher that needs none
                made.insert(0, LatentParts(self.context, samples, latents))
            queries = self.artifacts["queries"]
            made.append(RetrainingParts(self.context, samples, latents, queries, self.artifacts[RetrainingParts.kind]))
            if RemovalParts.kind in self.artifacts:
                models, plan = self.artifacts[RemovalParts.kind], self.artifacts[REMOVAL_PLAN]
                made.append(RemovalParts(self.context, samples, latents, queries, models, plan))
        return {parts.kind: parts for parts in sorted(made, key=lambda parts: parts.after_scores)}

    @functools.cached_property
    def scores(self) -> ScoreParts:
        return ScoreParts(self.context, family_of(self.config), self.artifacts)

    @property
    def score_run(self) -> ScoreRun:
        """The plan of the run's pairs, made again from its candidates."""
        return self.scores.score_run

    def assignment(self, generation: int, origin: str) -> Assignment:
        """Return the work of the run's workers. The score shards are counted in the run's plan."""
        counted = {kind: parts for kind, parts in self.parts.items() if parts is not self.scores}
        return assignment_of(self.name, self.context, self.artifacts, counted, generation, origin)


Work: TypeAlias = Run | Preparation  # that a coordinator has made, part by part


_held: dict[tuple[str, str], Work] = {}  # at most one, by location of the workspace and key of the assignment


def hold(location: str, work: Work, assignment: str) -> Work:
    """Let parts that this process makes be those of this object; the one before goes, with what it has loaded."""
    _held.clear()
    _held[location, assignment] = work
    return work


def let_go(work: Work) -> None:
    """Let go of this object, if it is held, with what it has loaded."""
    if work in _held.values():
        _held.clear()


def load_run(location: str, name: str, assignment: str) -> Work:
    """The run as of the assignment with this key: that of the coordinator where it is this process, else read once.

    Raises:
        StoreError: the run has no assignment.
    """
    return _held.get((location, assignment)) or hold(location, read_work(location, name), assignment)


def read_run_anew(location: str, name: str) -> Run:
    """The run as of its newest assignment.

    Raises:
        StoreError: the run has no assignment, as one that was imported.
    """
    return Run(*_assigned(location, name))


def read_work(location: str, name: str) -> Work:
    """The run or preparation of this name, as of its newest assignment.

    Raises:
        StoreError: there is no assignment.
    """
    context, artifacts = _assigned(location, name)
    return Run(context, artifacts) if "scores" in artifacts else Preparation(context, artifacts)


def _assigned(location: str, name: str) -> tuple[Context, dict[str, Artifact]]:
    workspace = Workspace.at(location)
    assignment = read_assignment(workspace, name)
    # The workspace as this process sees it: it may be mounted elsewhere here.
    config, _ = lifted(PipelineConfig, {**assignment.config, "workspace": location}, f"run {name}")
    artifacts = {
        each: Artifact(each, record.key, workspace.file(record.path), record.rows)
        for each, record in assignment.stages.items()
    }
    return Context(config, assignment.model_hash, checkpoint_hashes=assignment.checkpoint_hashes), artifacts
