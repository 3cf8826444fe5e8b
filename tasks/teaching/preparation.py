"""Work before a run is planned, by the same workers: the tars are read, and samples encoded, in parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from storage_schemas.runs.liveness import Assignment, PartsRecord
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, Loaded
from tasks.inputs.features import FeatureParts
from tasks.inputs.sample_parts import SampleParts
from tasks.parts import Parts


@dataclass(frozen=True, eq=False)
class Preparation:
    """Parts of one kind that no run has yet: what is known of a run is known of them, but for its plan.

    artifacts: what workers are told of, by name; that of the parts has the name of their kind.
    """

    context: Context
    artifacts: Mapping[str, Artifact]

    @classmethod
    def of_samples(cls, context: Context, parts: SampleParts) -> Preparation:
        """Return the reading of the tars, whose plan is written."""
        parts.keep_plan()
        return cls(_alone(context), {parts.kind: parts.artifact})

    @classmethod
    def of_features(cls, context: Context, parts: FeatureParts) -> Preparation:
        """Return the encoding of samples."""
        folders = {f"{_ENCODER}{name}": Artifact(name, key, path, 0) for name, (path, key) in parts.folders.items()}
        return cls(_alone(context), {_SAMPLES: parts.items, **folders, parts.kind: parts.artifact})

    @property
    def name(self) -> str:
        """The name under which workers, `fastgda status` and `fastgda retry` know it."""
        return f"{self.config.name}-{self._kind}-{self.artifacts[self._kind].key[:10]}"

    @property
    def _kind(self) -> str:
        return FeatureParts.kind if FeatureParts.kind in self.artifacts else SampleParts.kind

    @property
    def config(self) -> PipelineConfig:
        return self.context.config

    @property
    def workspace(self) -> Workspace:
        return self.context.workspace

    @functools.cached_property
    def parts(self) -> dict[str, Parts]:
        """The parts, by their kind, of which there is one."""
        made: Parts
        if self._kind == FeatureParts.kind:
            found = {name: each for name, each in self.artifacts.items() if name.startswith(_ENCODER)}
            folders = {name.removeprefix(_ENCODER): (each.path, each.key) for name, each in found.items()}
            made = FeatureParts(self.context, replace(self.artifacts[_SAMPLES], name="samples"), folders)
        else:
            made = SampleParts.planned(self.workspace, self.artifacts[SampleParts.kind].key)
        return {made.kind: made}

    @property
    def scores(self) -> None:
        """A preparation has no scores."""

    def assignment(self, generation: int, origin: str) -> Assignment:
        """Return the work of its workers."""
        return assignment_of(self.name, self.context, self.artifacts, self.parts, generation, origin)


_ENCODER = "features by "  # before the name of an encoder, in the name of the artifact that its files are
_SAMPLES = "data set"  # the artifact of the samples, beside which "samples" is a kind of parts


def _alone(context: Context) -> Context:
    """Return the context with nothing loaded: encoders leave the device with the preparation."""
    return replace(context, loaded=Loaded())


def assignment_of(
    name: str,
    context: Context,
    artifacts: Mapping[str, Artifact],
    parts: Mapping[str, Parts],
    generation: int,
    origin: str,
) -> Assignment:
    """Return the work of the workers of a run or preparation; `parts` are those that are counted in it."""
    stages = {
        kind: PartsRecord(
            key=artifact.key,
            path=context.workspace.relative(artifact.path),
            rows=artifact.rows,
            parts=parts[kind].count if kind in parts else 0,
        )
        for kind, artifact in artifacts.items()
    }
    config = context.config
    return Assignment(
        run=name,
        config=config.model_dump(mode="json", exclude={"execution"}),
        model_hash=context.model_hash,
        checkpoint_hashes=context.checkpoint_hashes,
        stages=stages,
        execution=config.execution.model_dump(mode="json"),
        generation=generation,
        origin=origin,
    )
