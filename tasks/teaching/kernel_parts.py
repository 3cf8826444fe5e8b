"""What the teachers of gradient features keep: features of samples and of queries, and the kernel between them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgda_core.curvature.layers import matrix_shape
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.sampling import journey
from fastgda_core.errors import NonFiniteLoss
from fastgda_core.sketches.projection import Projection
from fastgda_core.teachers.kernel import KERNEL_TEACHERS, KernelTeacher, journey_gradient
from fastgda_core.teachers.kernels import DUAL_SAMPLES, DualKernel, Kernel, PrimalKernel
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import query_gradient
from storage_schemas.commit import Manifest
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, load_tensors
from tasks.inputs.queries import Query, load_queries, starting_number
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.noise import noise_plan
from tasks.teaching.tensor_parts import QueryParts, TensorParts, without_a_number

FEATURES, ASKED, KERNEL = "gradient features", "query features", "kernel"
_TILES_IN_MEMORY = 2**29  # bytes; beyond, the tiles of a kernel lie in a temporary folder


def kernel_teacher(config: PipelineConfig) -> KernelTeacher:
    """Return the configured teacher, one of this family."""
    return KERNEL_TEACHERS[config.teacher.name]


def _model(context: Context) -> DiffusionModel:
    return context.teacher_model().with_objective(kernel_teacher(context.config).objective)


def projection_of(context: Context) -> Projection:
    """Return the projection of the run's gradients, on the context's device, drawn once a run."""
    config, method = context.config.teacher, kernel_teacher(context.config)
    sizes = {name: int(np.prod(matrix_shape(layer))) for name, layer in context.layers(context.teacher_model()).items()}
    size = config.projection or method.dimensions
    key = (tuple(sizes.items()), size, config.seed)
    return context.loaded.once("projection", key, lambda: Projection.drawn(sizes, size, config.seed, context.device))


class FeatureParts(TensorParts):
    """The gradient features of all samples at one checkpoint, as many a part as a score shard has.

    Numbers are float16, each feature with the largest one as its unit: what this rounds changes an inner product by at
    most 2^-10 of the product of the two lengths.
    """

    kind = title = FEATURES

    def __init__(self, context: Context, latents: Artifact, features: Artifact) -> None:
        self.context, self.latents, self.artifact = context, latents, features
        self.kind = self.title = features.name
        self.step = context.config.teacher.shard_samples

    @property
    def count(self) -> int:
        return -(-self.latents.rows // self.step)

    def rows(self, number: int) -> int:
        return min(self.step, self.latents.rows - number * self.step)

    def make(self, number: int) -> Manifest:
        context, started = self.context, time.monotonic()
        train_ids = np.arange(number * self.step, number * self.step + self.rows(number))
        method, plan, projection = kernel_teacher(context.config), noise_plan(context.config), projection_of(context)

        def of_samples(chosen: NDArray[np.int64]) -> Tensor:
            model, block = _model(context), load_block(context, self.latents, chosen.tolist())
            size = context.micro_batch("gradients")
            return method.of_samples(model, context.layers(model), plan, block, projection, size).float().cpu()

        known = unreadable_samples(self.latents, train_ids.tolist())
        nothing = torch.empty(0, context.config.model.images, 1)
        good, features, left_out = without_bad_samples(train_ids, known, of_samples, nothing)
        unit = features.abs().amax(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        tensors = {"train_ids": torch.from_numpy(good), "features": (features / unit).half(), "units": unit}
        return self.keep(number, tensors, started, rows=len(good), quarantined=left_out)

    def load(self, number: int) -> tuple[NDArray[np.int64], Tensor]:
        """Return a part's samples, ascending, and their features, (n, flips, d) float32, on the context's device."""
        stored = {name: each.to(self.context.device) for name, each in load_tensors(self.path(number)).items()}
        return stored["train_ids"].cpu().numpy(), stored["features"].float() * stored["units"]

    def blocks(self) -> Iterator[Tensor]:
        """Yield the rows of Phi, (some, d): those of both flips where these count, and together as one."""
        for number in range(self.count):
            _, features = self.load(number)
            if len(features):
                yield features.flatten(0, 1) / features.shape[1] ** 0.5


class AskedParts(QueryParts):
    """The gradient feature of every query at one checkpoint, a part each."""

    kind = title = ASKED

    def __init__(self, context: Context, queries: Artifact, asked: Artifact) -> None:
        self.context, self.queries, self.artifact = context, queries, asked
        self.kind = self.title = asked.name

    def make(self, number: int) -> Manifest:
        """Compute and commit the feature of one query.

        Raises:
            UsageError: the query's gradient is no number; no other sample could stand in for the query.
        """
        started, query = time.monotonic(), load_queries(self.queries)[number]
        try:
            feature = self._feature(query)
        except NonFiniteLoss as error:
            raise without_a_number(query) from error
        return self.keep(number, {"feature": feature.float().cpu().contiguous()}, started)

    def load(self, numbers: list[int]) -> Tensor:
        """Return the features of some queries, (queries, d) float32, on the context's device."""
        return torch.stack([load_tensors(self.path(number))["feature"] for number in numbers]).to(self.context.device)

    def _feature(self, query: Query) -> Tensor:
        context, config, method = self.context, self.context.config.teacher, kernel_teacher(self.context.config)
        model, projection, micro_batch = _model(context), projection_of(context), context.micro_batch("gradients")
        layers, condition = context.layers(model), model.encode_captions([query.caption])
        if method.journey and (number := starting_number(query)) is not None:
            timesteps, clean = _journey(context, query, number)
            gradient = journey_gradient(
                model, layers, clean, timesteps, condition,
                owner=query.owner, seed=config.seed, pairs=config.gradient_pairs, micro_batch=micro_batch,
            )  # fmt: skip
            return method.of_gradient(gradient, projection)
        latent = model.encode_images([query.image])[0]
        if method.each_timestep:  # the very timesteps of the samples
            one = torch.zeros(1, dtype=torch.long, device=context.device)
            block = SampleBlock(one + query.owner, latent[None, None], condition, one, one)
            return method.of_samples(model, layers, noise_plan(context.config), block, projection, micro_batch)[0, 0]
        gradient = query_gradient(
            model, layers, latent, condition,
            owner=query.owner, seed=config.seed, pairs=config.gradient_pairs, micro_batch=micro_batch,
        )  # fmt: skip
        return method.of_gradient(gradient, projection)


def _journey(context: Context, query: Query, number: int) -> tuple[Tensor, Tensor]:
    """Generate a query again by the sampler that made it: timesteps (steps,) and clean images (steps, c, h, w)."""
    config = context.config.queries
    steps = list(
        journey(
            context.model(), [query.caption], [number],
            seed=config.seed, steps=config.steps, guidance_scale=config.guidance_scale,
        )
    )  # fmt: skip
    timesteps = torch.tensor([step.timestep for step in steps], device=context.device)
    return timesteps, torch.cat([step.clean for step in steps])


class KernelParts(TensorParts):
    """The kernel before the queries' features, (queries, d) float32: one part."""

    kind = title = KERNEL

    def __init__(self, features: FeatureParts, asked: AskedParts, kernel: Artifact) -> None:
        self.context, self.features, self.asked, self.artifact = features.context, features, asked, kernel

    @property
    def count(self) -> int:
        return 1

    def rows(self, number: int) -> int:
        return self.asked.count

    def make(self, number: int) -> Manifest:
        config, started = self.context.config.teacher, time.monotonic()
        every = [
            list(range(first, min(first + config.loaded_queries, self.asked.count)))
            for first in range(0, self.asked.count, config.loaded_queries)
        ]
        with tempfile.TemporaryDirectory() as scratch:
            kernel = self._kernel(Path(scratch))
            found = torch.cat([kernel.of(self.asked.load(numbers)).float().cpu() for numbers in every])
        return self.keep(number, {"kernel": found.contiguous()}, started)

    def _kernel(self, scratch: Path) -> Kernel:
        method, size = kernel_teacher(self.context.config), self.asked.load([0]).shape[1]
        dimensions = self.context.config.teacher.projection or method.dimensions
        ridge = method.lambda_of(self.context.config.teacher.ridge, dimensions)
        rows = self.features.latents.rows * self.context.config.model.images
        if rows <= min(DUAL_SAMPLES, size):
            return DualKernel(torch.cat(list(self.features.blocks())), ridge)
        in_memory = 4 * size * size <= _TILES_IN_MEMORY
        tiles = {} if in_memory else ScratchTiles(scratch, self.context.device)
        return PrimalKernel(self.features.blocks, size, ridge, tiles)

    def load(self, numbers: list[int]) -> Tensor:
        """Return the vectors of some queries, (queries, d) float32, on the context's device; all are kept in memory."""
        path = part(self.artifact.path, 0, self.suffix)
        whole = self.context.loaded.once(KERNEL, self.artifact.key, lambda: load_tensors(path)["kernel"])
        return whole[numbers].to(self.context.device)


class ScratchTiles(MutableMapping[tuple[int, int], Tensor]):
    """Tiles of a matrix as files of a folder, one in memory at a time."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._there: set[tuple[int, int]] = set()

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        return load_file(self._path(place), device=str(self._device))["tile"]

    def __setitem__(self, place: tuple[int, int], tile: Tensor) -> None:
        save_file({"tile": tile.contiguous()}, self._path(place))
        self._there.add(place)

    def __delitem__(self, place: tuple[int, int]) -> None:
        self._there.remove(place)
        self._path(place).unlink()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def _path(self, place: tuple[int, int]) -> Path:
        return self._folder / f"{place[0]}-{place[1]}.safetensors"
