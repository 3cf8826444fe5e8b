"""One unlearning step per query: how the weights move when the model forgets it."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgda_core.curvature.fisher import Fisher, load_fisher
from fastgda_core.teachers.unlearning import compress, expand, query_gradient, unlearning_update
from storage_schemas.commit import commit, committed, input_key
from storage_schemas.workspace import part
from tasks.context import Context, Stage, stage_of_parts
from tasks.progress import stage
from tasks.queries import Query, load_queries

_ERROR = "/relative_error"


@task(task_run_name="unlearning steps", cache_policy=NO_CACHE)
def unlearn_queries(context: Context, latents: Stage, curvature: Stage, queries: Stage) -> Stage:
    """Delta theta of every query, one file each."""
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
    )
    folder = context.workspace.updates(key)
    paths = [part(folder, number, "safetensors") for number in range(queries.rows)]
    missing = [number for number, path in enumerate(paths) if committed(path, key) is None]
    with stage("unlearning steps", len(missing)) as advance:
        fisher = load_fisher(curvature.path, config.damping).to(context.device) if missing else None
        for number in missing:
            assert fisher is not None
            started = time.monotonic()
            update = query_update(context, load_queries(queries)[number], fisher, training_size, config.seed)
            commit(
                paths[number],
                functools.partial(save_file, _stored(update, config.update_rank)),
                key=key,
                rows=1,
                started=started,
                device=str(context.device),
            )
            advance(1)
    return stage_of_parts("unlearning steps", key, folder, paths, queries.rows, reused=not missing)


def query_update(context: Context, query: Query, fisher: Fisher, training_size: int, seed: int) -> dict[str, Tensor]:
    """Delta theta of one query; `seed` is that of its gradient's Monte-Carlo pairs."""
    config, model = context.config.teacher, context.teacher_model()
    gradient = query_gradient(
        model,
        context.layers(model),
        model.encode_images([query.image])[0],
        model.encode_captions([query.caption]),
        owner=query.owner,
        seed=seed,
        pairs=config.gradient_pairs,
        micro_batch=context.micro_batch("gradients"),
    )
    gradient = {name: layer.float() for name, layer in gradient.items()}
    return unlearning_update(fisher, gradient, alpha=config.alpha, training_size=training_size)


def _stored(update: dict[str, Tensor], rank: int | None) -> dict[str, Tensor]:
    error = 0.0
    if rank is not None:
        update, error = compress(update, rank)
    tensors = {name: layer.cpu().contiguous() for name, layer in update.items()}
    return {**tensors, _ERROR: torch.tensor(error, dtype=torch.float64)}


class QueryUpdates:
    """Delta theta of some queries by layer, (queries, d_out, d_in), a device's fill at a time."""

    def __init__(self, updates: Stage, numbers: list[int], at_a_time: int, device: torch.device) -> None:
        self.blocks = [tuple(numbers[start : start + at_a_time]) for start in range(0, len(numbers), at_a_time)]
        self.updates, self.device = updates, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for block in self.blocks:
            yield _load(self.updates, block, self.device)


@functools.lru_cache(maxsize=1)
def _load(updates: Stage, numbers: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    loaded = [load_file(part(updates.path, number, "safetensors")) for number in numbers]
    return expand(
        {name: torch.stack([update[name] for update in loaded]).to(device) for name in loaded[0] if name != _ERROR}
    )


def relative_errors(updates: Stage, numbers: list[int]) -> list[float]:
    """What keeping Delta theta at a low rank lost of each query's, relative in the Frobenius norm."""
    return [load_file(part(updates.path, number, "safetensors"))[_ERROR].item() for number in numbers]
