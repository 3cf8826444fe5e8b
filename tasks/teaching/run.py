"""What a worker process needs of a run, rebuilt from the workspace and kept for as long as it stays the same."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from storage_schemas import tables
from storage_schemas.commit import Manifest, committed
from storage_schemas.files import AnyPath
from storage_schemas.runs.ledger import done_shards
from storage_schemas.runs.liveness import Assignment, PartsRecord, read_assignment
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.config.stored import lifted
from tasks.context import Context, Stage
from tasks.teaching.base_losses import BaseLossParts, forget_base_losses
from tasks.teaching.curvature import CurvatureParts
from tasks.teaching.latents import LatentParts
from tasks.teaching.score_plan import ScoreRun, plan_scores
from tasks.teaching.scores import ScoreParts
from tasks.teaching.unlearning import UpdateParts

KINDS = ("latents", "curvature", "unlearning steps", "base losses", "scores")  # in the order in which they are made


class Parts(Protocol):
    """Files of one kind that together are a stage; each is made, committed and tried again alone."""

    @property
    def kind(self) -> str: ...
    @property
    def count(self) -> int: ...
    def path(self, number: int) -> AnyPath: ...
    def key(self, number: int) -> str:
        """Of everything that the file depends on."""

    def rows(self, number: int) -> int:
        """Planned, for progress."""

    def make(self, number: int) -> Manifest:
        """Compute and commit one."""


@dataclass(frozen=True, eq=False)
class RunInputs:
    """A run's context, and where each of its stages lies or will."""

    run: str
    context: Context
    stages: dict[str, Stage]

    @property
    def workspace(self) -> Workspace:
        return self.context.workspace

    @functools.cached_property
    def score_run(self) -> ScoreRun:
        """The plan of the run's pairs, made again from its candidates."""
        return plan_scores(self.context, self.stages["candidates"], self.stages["queries"])

    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if kind == "scores" or kind in self.stages]

    @functools.lru_cache(maxsize=8)  # noqa: B019  # these objects are few and live as long as their process
    def parts(self, kind: str) -> Parts:
        stages = self.stages
        latents = stages["latents"]
        if kind == "latents":
            return LatentParts(self.context, stages["samples"], latents)
        if kind == "curvature":
            return CurvatureParts(self.context, latents, stages["curvature"])
        updates = stages["unlearning steps"]
        if kind == "unlearning steps":
            return UpdateParts(self.context, latents, stages["curvature"], stages["queries"], updates)
        base_losses = stages.get("base losses")
        if kind == "base losses":
            assert base_losses is not None
            return BaseLossParts(self.context, latents, base_losses)
        return ScoreParts(self.context, self.score_run, latents, updates, base_losses)

    def missing(self, kind: str) -> list[int]:
        """Numbers of the parts that are not committed."""
        if kind == "scores":
            # By plan and manifests alone: no pair is looked at, and shards may lie in large files by now.
            return sorted(self._planned.keys() - done_shards(self.workspace, self.run))
        parts = self.parts(kind)
        return [number for number in range(parts.count) if committed(parts.path(number), parts.key(number)) is None]

    @functools.cached_property
    def _planned(self) -> dict[int, int]:
        """Pairs of each score shard, from the stored plan."""
        plan = tables.read(self.workspace.plan_shards(self.run), tables.PLAN_SHARDS)
        return dict(zip(plan["shard"].to_pylist(), plan["pairs"].to_pylist(), strict=True))

    def count(self, kind: str) -> int:
        """How many parts there are of a kind."""
        return len(self._planned) if kind == "scores" else self.parts(kind).count

    def path(self, kind: str, number: int) -> AnyPath:
        """Where a part lies, or will."""
        return self.workspace.score_shard(self.run, number) if kind == "scores" else self.parts(kind).path(number)

    def rows(self, kind: str, numbers: Iterable[int]) -> Iterator[int]:
        """Planned in each of these parts."""
        for number in numbers:
            yield self._planned[number] if kind == "scores" else self.parts(kind).rows(number)

    def assignment(self, generation: int, origin: str) -> Assignment:
        stages = {
            name: PartsRecord(
                key=stage.key,
                path=self.workspace.relative(stage.path),
                rows=stage.rows,
                parts=self.count(name) if name in KINDS and name != "scores" else 0,
            )
            for name, stage in self.stages.items()
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
    forget_base_losses()  # what an earlier assignment left in memory may have been made again since
    workspace = Workspace.at(location)
    found = read_assignment(workspace, run)
    # The workspace as this process sees it: it may be mounted elsewhere here.
    config, _ = lifted(PipelineConfig, {**found.config, "workspace": location}, f"run {run}")
    stages = {
        name: Stage(name, record.key, workspace.file(record.path), record.rows, 0.0, True)
        for name, record in found.stages.items()
    }
    return RunInputs(run, Context(config, found.model_hash), stages)
