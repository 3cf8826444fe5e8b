"""One unlearning step per query: the change of the weights when the model forgets it."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from fastgda_core.curvature.fisher import Fisher, load_fisher
from fastgda_core.errors import NonFiniteLoss
from fastgda_core.teachers.unlearning import compress, expand, expected_spread, query_gradients, unlearning_update
from storage_schemas.commit import Manifest, input_key
from storage_schemas.files import local_copy
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.context import Context, load_tensors
from tasks.inputs.queries import Query, load_queries
from tasks.teaching.tensor_parts import QueryParts, without_a_number

# Of the whole update, beside its layers: what a low rank lost; at a checkpoint, what a score is divided by.
_ERROR, _SPREAD = "/relative_error", "/expected_spread"


def updates_of(context: Context, latents: Artifact, curvature: Artifact, queries: Artifact) -> Artifact:
    """Return the artifact of every query's Delta theta, which need not be made yet."""
    config = context.config.teacher
    training_size = config.training_size or latents.rows
    key = input_key(
        "updates",
        curvature.key,
        queries.key,
        config.alpha,
        training_size,
        config.gradient_pairs,
        config.seed,
        config.damping,
        config.update_rank,
        config.precision,
        config.objective,
    )
    folder = UpdateParts.together(context.workspace, key, queries.rows)
    return replace(folder, name=context.named(folder.name))


class UpdateParts(QueryParts):
    """Delta theta of every query, a part each."""

    kind = title = "unlearning steps"

    def __init__(
        self, context: Context, latents: Artifact, curvature: Artifact, queries: Artifact, updates: Artifact
    ) -> None:
        self.context, self.curvature, self.queries, self.artifact = context, curvature, queries, updates
        self.samples = latents.rows
        self.kind = self.title = updates.name

    def make(self, number: int) -> Manifest:
        """Compute and commit Delta theta of one query.

        Raises:
            UsageError: the query's gradient is no number; no other sample could stand in for the query.
        """
        context, config, started = self.context, self.context.config.teacher, time.monotonic()
        query = load_queries(self.queries)[number]
        fisher = device_fisher(context, self.curvature)
        try:
            gradient = gradient_of(context, query, config.seed)
        except NonFiniteLoss as error:
            raise without_a_number(query) from error
        update = update_of(context, gradient, fisher, self.samples)
        stored = update_tensors(update, config.update_rank)
        if context.taught_at:
            stored[_SPREAD] = torch.tensor(expected_spread(fisher, update), dtype=torch.float64)
        return self.keep(number, stored, started)


def device_fisher(context: Context, curvature: Artifact) -> Fisher:
    """Return the Fisher on the context's device, loaded once a run.

    Two are kept for the run's self-consistency, at each checkpoint.
    """
    damping, device = context.config.teacher.damping, context.device
    most = 2 * len(context.at_checkpoints())

    def load() -> Fisher:
        return load_fisher(local_copy(curvature.path), damping).to(device)

    return context.loaded.once("Fisher", (curvature, damping), load, most=most)


def gradient_of(context: Context, query: Query, seed: int) -> dict[str, Tensor]:
    """Return the gradient of one query's objective, by layer; `seed` is that of its Monte-Carlo pairs."""
    together = gradients_of(context, query.image, query.caption, owner=query.owner, seed=seed, groups=1)
    return {name: gradient[0] for name, gradient in together.items()}


def gradients_of(
    context: Context, image: Image.Image, caption: str, *, owner: int, seed: int, groups: int
) -> dict[str, Tensor]:
    """Return the gradient of an image's objective in groups of its pairs, by layer; see `query_gradients`."""
    model = context.teacher_model()
    model = model.with_objective(model.objective.of_query)
    gradients = query_gradients(
        model,
        context.layers(model),
        model.encode_images([image])[0],
        model.encode_captions([caption]),
        owner=owner,
        seed=seed,
        pairs=context.config.teacher.gradient_pairs,
        groups=groups,
        micro_batch=context.micro_batch("gradients"),
    )
    return {name: layer.float() for name, layer in gradients.items()}


def owner_of(image: Image.Image, caption: str) -> int:
    """Return a 48-bit number that stands for an image and its caption in noise streams."""
    digest = hashlib.sha256(b"\0".join([repr(image.size).encode(), image.tobytes(), caption.encode()])).digest()
    return int.from_bytes(digest[:6], "big")


def update_of(context: Context, gradient: dict[str, Tensor], fisher: Fisher, samples: int) -> dict[str, Tensor]:
    """Return Delta theta, by layer, from a query's gradient; `samples` is the number of samples in the workspace."""
    config = context.config.teacher
    assert config.alpha is not None
    return unlearning_update(fisher, gradient, alpha=config.alpha, training_size=config.training_size or samples)


def update_tensors(update: dict[str, Tensor], rank: int | None) -> dict[str, Tensor]:
    """Return Delta theta as a part keeps it, at a low rank where one is given, with what that loses."""
    error = 0.0
    if rank is not None:
        update, error = compress(update, rank)
    tensors = {name: layer.cpu().contiguous() for name, layer in update.items()}
    return {**tensors, _ERROR: torch.tensor(error, dtype=torch.float64)}


class QueryUpdates:
    """Delta theta of some queries by layer, (queries, d_out, d_in), a device's fill at a time.

    The last one at each checkpoint stays loaded, for whoever asks for the same queries next.
    """

    def __init__(self, context: Context, updates: Artifact, numbers: list[int], at_a_time: int) -> None:
        self.blocks = [tuple(numbers[start : start + at_a_time]) for start in range(0, len(numbers), at_a_time)]
        self.context, self.updates = context, updates

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for block in self.blocks:
            load = functools.partial(_load, self.updates, block, self.context.device)
            most = len(self.context.at_checkpoints())
            yield self.context.loaded.once("unlearning steps", (self.updates, block), load, most=most)


def _load(updates: Artifact, numbers: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    loaded = [load_tensors(part(updates.path, number, "safetensors")) for number in numbers]
    return expand(
        {
            name: torch.stack([update[name] for update in loaded]).to(device)
            for name in loaded[0]
            if not name.startswith("/")
        }
    )


def relative_errors(updates: Artifact, numbers: list[int]) -> list[float]:
    """Return what a low rank lost of each query's Delta theta, relative in the Frobenius norm."""
    return [load_tensors(part(updates.path, number, "safetensors"))[_ERROR].item() for number in numbers]


def expected_spreads(updates: Artifact, numbers: list[int]) -> Tensor:
    """Return the expected spread of some queries' scores at a checkpoint, (queries,) float64; see `expected_spread`."""
    return torch.stack([load_tensors(part(updates.path, number, "safetensors"))[_SPREAD] for number in numbers])
