"""What a worker process needs of a run, rebuilt from the workspace and kept for as long as it stays the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from storage_schemas.runs.liveness import Assignment, PartsRecord, read_assignment
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.config.stored import lifted
from tasks.context import Context
from tasks.teaching.families import family_of
from tasks.teaching.parts import Parts
from tasks.teaching.score_plan import ScoreRun
from tasks.teaching.scores import ScoreParts


@dataclass(frozen=True, eq=False)
class RunInputs:
    """A run's context, and where each of its artifacts lies or will, by name."""

    context: Context
    artifacts: dict[str, Artifact]

    @property
    def run(self) -> str:
        """The run's name."""
        return self.artifacts["scores"].key

    @property
    def workspace(self) -> Workspace:
        return self.context.workspace

    @functools.cached_property
    def parts(self) -> dict[str, Parts]:
        """What the run is made of, by kind, in the order in which it is made; scores last."""
        family = family_of(self.context.config)
        made = [*family.parts(self.context, self.artifacts), self.scores]
        return {parts.kind: parts for parts in made}

    @functools.cached_property
    def scores(self) -> ScoreParts:
        return ScoreParts(self.context, family_of(self.context.config), self.artifacts)

    @property
    def score_run(self) -> ScoreRun:
        """The plan of the run's pairs, made again from its candidates."""
        return self.scores.score_run

    def assignment(self, generation: int, origin: str) -> Assignment:
        """What workers are to do. The score shards are counted in the run's plan."""
        counts = {kind: parts.count for kind, parts in self.parts.items() if parts is not self.scores}
        stages = {
            name: PartsRecord(
                key=artifact.key,
                path=self.workspace.relative(artifact.path),
                rows=artifact.rows,
                parts=counts.get(name, 0),
            )
            for name, artifact in self.artifacts.items()
        }
        config = self.context.config.model_dump(mode="json", exclude={"execution"})
        return Assignment(
            run=self.run,
            config=config,
            model_hash=self.context.model_hash,
            stages=stages,
            execution=self.context.config.execution.model_dump(mode="json"),
            generation=generation,
            origin=origin,
        )


@functools.lru_cache(maxsize=1)
def load_inputs(location: str, run: str, _assignment: str) -> RunInputs:
    """The run's inputs as of the assignment with this key, loaded once per process.

    Raises:
        StoreError: the run has no assignment.
    """
    workspace = Workspace.at(location)
    found = read_assignment(workspace, run)
    # The workspace as this process sees it: it may be mounted elsewhere here.
    config, _ = lifted(PipelineConfig, {**found.config, "workspace": location}, f"run {run}")
    family_of(config).forget()  # what an earlier assignment left in memory may have been made again since
    artifacts = {
        name: Artifact(name, record.key, workspace.file(record.path), record.rows)
        for name, record in found.stages.items()
    }
    return RunInputs(Context(config, found.model_hash), artifacts)
