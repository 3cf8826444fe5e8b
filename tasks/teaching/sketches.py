"""Sketches of the training samples' gradients: how they are made is chosen once a run, score shards make most of them.

A score shard whose samples are those of a sketch part commits that part from the gradients that it has at hand. What is
missing after the scores is made by itself: where a run was scored before it was told to keep sketches, or where not all
samples are candidates.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher
from fastgda_core.sketches.eigen import EigenSketch, Moments, step_moments
from fastgda_core.sketches.int8 import Int8Vectors
from fastgda_core.sketches.principal import PrincipalSketch
from fastgda_core.teachers.sample_gradients import SampleGradients, sample_gradients
from storage_schemas.commit import Manifest, commit, committed, input_key
from storage_schemas.files import write_atomically
from storage_schemas.runs.noise_plan import NOISE_PLAN
from storage_schemas.runs.sketches import SKETCH_FILE, SketchRecord
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.config.teaching import SketchesConfig
from tasks.context import Context, load_tensors
from tasks.inputs.queries import load_queries
from tasks.parts import Parts
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.curvature import some_samples
from tasks.teaching.families import Artifacts
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.noise import plan_inputs, run_plan
from tasks.teaching.tensor_parts import TensorParts
from tasks.teaching.updates import QueryUpdates, device_fisher


def basis_of(context: Context, updates: Artifact, plan: Artifact | None = None) -> Artifact:
    """Return the artifact of how sketches are made, which need not be made yet.

    `plan` is that of a noise plan which a pilot chooses.
    """
    config = _config(context)
    key = input_key("sketch basis", updates.key, plan_inputs(context, plan), config)
    return BasisParts.together(context.workspace, key, config.pilot)


def sketches_of(context: Context, latents: Artifact, basis: Artifact) -> Artifact:
    """Return the artifact of the sketches of all samples, which need not be made yet."""
    key = input_key("sketches", basis.key, context.config.teacher.shard_samples)
    return SketchParts.together(context.workspace, key, latents.rows)


def _config(context: Context) -> SketchesConfig:
    config = context.config.sketches
    assert config is not None
    return config


class BasisParts(Parts):
    """How sketches are made: the coordinates and directions that are kept of a gradient, in one part.

    They are chosen by the gradients of some training samples and by the unlearning steps of training queries. Queries
    that a figure is reported of have no say.
    """

    kind = title = "sketch basis"
    suffix = "safetensors"

    def __init__(
        self,
        context: Context,
        latents: Artifact,
        curvature: Artifact,
        queries: Artifact,
        updates: Artifact,
        basis: Artifact,
        plan: Artifact | None = None,
    ) -> None:
        self.context, self.latents, self.curvature, self.artifact = context, latents, curvature, basis
        self.queries, self.updates, self.plan = queries, updates, plan

    @property
    def count(self) -> int:
        return 1

    def rows(self, number: int) -> int:
        return min(self.artifact.rows, self.latents.rows)

    def make(self, number: int) -> Manifest:
        context, config, started = self.context, _config(self.context), time.monotonic()
        fisher = sketched_fisher(context, self.curvature)
        seen = {name: factors.eigenvalues.flatten().double() for name, factors in fisher.layers.items()}
        eigen = EigenSketch.of_most_energy(fisher, seen, self._steps(fisher), config.coordinates)
        pilot = np.unique(some_samples(self.latents, self.rows(number), config.seed))
        step = context.config.teacher.shard_samples
        # A gigabyte, held once. Who is left out now is not asked again: all sketches rest on one basis.
        sketches, filled = torch.empty(len(pilot) * context.config.model.images, len(eigen), dtype=torch.bfloat16), 0
        for train_ids in np.split(pilot, range(step, len(pilot), step)):
            found = sketched(context, self.latents, train_ids, eigen, self.plan).sketches.flatten(0, 1)
            sketches[filled : filled + len(found)] = found
            filled += len(found)
        sketch = PrincipalSketch.of_samples_like(eigen, sketches[:filled], config.size)
        record = SketchRecord(
            kind="principal",
            size=len(sketch),
            coordinates=len(eigen),
            coordinates_energy=eigen.energy_kept,
            directions_energy=float(sketch.energy_kept[-1]),
        )
        path, key, device = self.path(number), self.key(number), str(context.device)
        write_atomically(path.with_name(SKETCH_FILE), record.model_dump_json(indent=2).encode() + b"\n")
        return commit(path, sketch.save, key=key, rows=self.rows(number), started=started, device=device)

    def _steps(self, fisher: EkfacFisher) -> Moments:
        """Return the mean squares of training queries' unlearning steps; without such queries, of samples' own."""
        numbers = [number for number, query in enumerate(load_queries(self.queries)) if query.split == "train"]
        if numbers:
            return step_moments(fisher, QueryUpdates(self.context, self.updates, numbers, at_a_time=1))
        return {
            name: (factors.eigenvalues / factors.damped(fisher.damping).square()).flatten().double()
            for name, factors in fisher.layers.items()
        }


def sketched_fisher(context: Context, curvature: Artifact) -> EkfacFisher:
    """Return the Fisher in whose eigenbasis sketches are, on the context's device."""
    fisher = device_fisher(context, curvature)
    assert isinstance(fisher, EkfacFisher)
    return fisher


def load_sketch(context: Context, curvature: Artifact, basis: Artifact) -> PrincipalSketch:
    """Load how sketches are made, on the context's device, once a run."""

    def load() -> PrincipalSketch:
        tensors = load_tensors(part(basis.path, 0, BasisParts.suffix))
        return PrincipalSketch.load(tensors, sketched_fisher(context, curvature))

    return context.loaded.once("sketch basis", basis.key, load)


class Sketched(NamedTuple):
    """Sketches of some training samples, (n, flips, size) on the CPU; left_out: the other samples, and why."""

    train_ids: NDArray[np.int64]
    sketches: Tensor
    left_out: dict[int, str]


def sketched(
    context: Context,
    latents: Artifact,
    train_ids: NDArray[np.int64],
    sketch: EigenSketch | PrincipalSketch,
    chosen_plan: Artifact | None,
) -> Sketched:
    """Run the model on some samples, ascending, and sketch their gradients under the run's noise plan."""

    def of_samples(chosen: NDArray[np.int64]) -> Tensor:
        model, block = context.teacher_model(), load_block(context, latents, chosen.tolist())
        plan, micro_batch = run_plan(context, chosen_plan), context.micro_batch("gradients")
        gradients = sample_gradients(model, context.layers(model), plan, block, micro_batch)
        return torch.cat([sketch.of_samples(some).cpu() for some in gradients])

    known = unreadable_samples(latents, train_ids.tolist())
    nothing = torch.empty(0, context.config.model.images, len(sketch))
    return Sketched(*without_bad_samples(train_ids, known, of_samples, nothing))


class SketchParts(TensorParts):
    """The sketches of all samples, as many a part as a score shard has."""

    kind = title = "sketches"
    after_scores = True

    def __init__(
        self,
        context: Context,
        latents: Artifact,
        curvature: Artifact,
        basis: Artifact,
        sketches: Artifact,
        plan: Artifact | None = None,
    ) -> None:
        self.context, self.latents, self.curvature = context, latents, curvature
        self.basis, self.artifact, self.plan = basis, sketches, plan
        self.step = context.config.teacher.shard_samples

    @classmethod
    def of_run(cls, context: Context, artifacts: Artifacts) -> Self | None:
        """Return the parts of a run's sketches; None where it keeps none."""
        if cls.kind not in artifacts:
            return None
        latents, curvature, basis, sketches = (
            artifacts[name] for name in ("latents", "curvature", BasisParts.kind, cls.kind)
        )
        return cls(context, latents, curvature, basis, sketches, artifacts.get(NOISE_PLAN))

    @property
    def count(self) -> int:
        return -(-self.latents.rows // self.step)

    def train_ids(self, number: int) -> NDArray[np.int64]:
        """Return the samples of a part, ascending, those that will be left out among them."""
        return np.arange(number * self.step, min((number + 1) * self.step, self.latents.rows))

    def rows(self, number: int) -> int:
        return len(self.train_ids(number))

    def make(self, number: int) -> Manifest:
        started = time.monotonic()
        sketch = load_sketch(self.context, self.curvature, self.basis)
        found = sketched(self.context, self.latents, self.train_ids(number), sketch, self.plan)
        return self._commit(number, found, started)

    def beside(self, train_ids: NDArray[np.int64]) -> SketchBeside | None:
        """Return what makes the part of these samples while their scores are made; None where no part is missing."""
        number = int(train_ids[0]) // self.step if len(train_ids) else 0
        if not np.array_equal(train_ids, self.train_ids(number)) or committed(self.path(number), self.key(number)):
            return None
        sketch = load_sketch(self.context, self.curvature, self.basis)
        return SketchBeside(self.context, sketch, functools.partial(self._commit, number))

    def _commit(self, number: int, made: Sketched, started: float) -> Manifest:
        packed = Int8Vectors.of(made.sketches.flatten(0, 1))
        shape = made.sketches.shape[:2]
        tensors = {
            "train_ids": torch.from_numpy(made.train_ids),
            "values": packed.values.unflatten(0, shape),
            "scales": packed.scales.unflatten(0, shape),
        }
        return self.keep(number, tensors, started, rows=len(made.train_ids), quarantined=made.left_out)


@dataclass(eq=False)
class SketchBeside:
    """Sketches gradients that somebody else has made."""

    context: Context
    sketch: PrincipalSketch
    _commit: Callable[[Sketched, float], Manifest]
    _found: list[Tensor] = field(default_factory=list)
    _seconds: float = 0.0

    def begin(self) -> None:
        """Forget what was seen: the samples are looked at again, without those that turned out to be bad."""
        self._found = []

    def look(self, gradients: SampleGradients) -> None:
        """Sketch the gradients of the next samples."""
        started = time.monotonic()
        self._found.append(self.sketch.of_samples(gradients).cpu())
        self._seconds += time.monotonic() - started

    def commit(self, train_ids: NDArray[np.int64], left_out: dict[int, str]) -> None:
        """Commit the part; the seconds behind it are those that it took beside the scores."""
        nothing = torch.empty(0, self.context.config.model.images, len(self.sketch))
        self._commit(
            Sketched(train_ids, torch.cat([nothing, *self._found]), left_out), time.monotonic() - self._seconds
        )
