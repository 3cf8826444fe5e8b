"""The unlearning step: the change of weights by which the model forgets a query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fastgda_core.curvature.fisher import Fisher
from fastgda_core.curvature.layers import Layer, add_to_weights, input_rows
from fastgda_core.diffusion.loss import Condition
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stratified_timesteps, stream_key
from fastgda_core.teachers.gradients import output_gradients, weight_gradient
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.training_loss import check_finite


def query_gradient(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    latent: Tensor,
    condition: Condition,
    *,
    owner: int,
    seed: int,
    pairs: int,
    micro_batch: MicroBatch,
) -> dict[str, Tensor]:
    """Return grad L(z_hat, theta_0), the mean over all pairs of `query_gradients`: by layer name, (d_out, d_in)."""
    together = query_gradients(
        model, layers, latent, condition, owner=owner, seed=seed, pairs=pairs, groups=1, micro_batch=micro_batch
    )
    return {name: gradient[0] for name, gradient in together.items()}


@torch.no_grad()
def query_gradients(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    latent: Tensor,
    condition: Condition,
    *,
    owner: int,
    seed: int,
    pairs: int,
    groups: int,
    micro_batch: MicroBatch,
) -> dict[str, Tensor]:
    """Return grad L(z_hat, theta_0) in groups of Monte-Carlo (eps, t) pairs, whose spread tells how sure their mean is.

    Timesteps are stratified, t_i uniform in the i-th of `pairs` equal parts of [0, T): unbiased, with less variance
    than independent draws. Pair i is in group i mod `groups`, so each group is spread over the schedule.

    Args:
        model: the frozen model.
        layers: those that the update will move.
        latent: of the generated image, (c, h, w).
        condition: of its caption, one row.
        owner: a number that stands for the query in the noise stream, in [0, 2^48).
        seed: of the noise stream.
        pairs: how many (eps, t) pairs.
        groups: how many means; it divides `pairs`.
        micro_batch: pairs per forward.

    Returns:
        the mean of each group by layer name, each (groups, d_out, d_in).
    """
    if pairs % groups:
        raise ValueError(f"{pairs} pairs cannot be split into {groups} groups of one size")
    steps = model.schedule.train_timesteps
    timesteps = stratified_timesteps(stream_key(seed, "query timesteps"), owner, pairs, steps).to(model.device)
    latents = latent.expand(pairs, *latent.shape)
    key = stream_key(seed, "query noise")
    return mean_gradients(model, layers, latents, condition, timesteps, key, owner, groups, micro_batch)


def mean_gradients(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    latents: Tensor,
    condition: Condition,
    timesteps: Tensor,
    noise_key: tuple[int, int],
    owner: int,
    groups: int,
    micro_batch: MicroBatch,
) -> dict[str, Tensor]:
    """Return the mean gradient of each group of rows, by layer name (groups, d_out, d_in); row i is in i mod `groups`.

    Args:
        model: the frozen model.
        layers: whose gradients are wanted.
        latents: clean, (rows, c, h, w).
        condition: of one caption, one row.
        timesteps: (rows,).
        noise_key: the stream; row i has the owner's draw i.
        owner: whose noise it is, in [0, 2^48).
        groups: how many means; it divides the number of rows.
        micro_batch: rows per forward.
    """
    pairs = len(timesteps)
    draws = torch.arange(pairs, device=model.device)

    def gradients_of(stretch: slice) -> dict[str, Tensor]:
        rows = len(draws[stretch])
        owners = torch.full_like(draws[stretch], owner)
        noise = gaussian_noise(noise_key, owners, timesteps[stretch], draws[stretch], tuple(latents.shape[1:]))
        losses, seen, gradients = output_gradients(
            model,
            layers,
            latents[stretch],
            {name: row.expand(rows, *row.shape[1:]) for name, row in condition.items()},
            timesteps[stretch],
            noise,
        )
        check_finite(losses, owners, timesteps[stretch])
        members = [slice((group - stretch.start) % groups, None, groups) for group in range(groups)]
        inputs = {name: input_rows(layers[name], seen[name]) for name in gradients}
        return {
            name: torch.stack(
                [_summed_weight_gradient(gradient[mine], inputs[name][mine], model.precision.dtype) for mine in members]
            )
            for name, gradient in gradients.items()
        }

    total: dict[str, Tensor] = {}
    for _, gradients in micro_batch.run(pairs, gradients_of):
        total = {name: total.get(name, 0) + gradient for name, gradient in gradients.items()}
    return {name: gradient / (pairs // groups) for name, gradient in total.items()}


def _summed_weight_gradient(gradient: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    rows = (tensor.to(dtype).flatten(0, 1)[None] for tensor in (gradient, seen))
    return weight_gradient(*rows)[0]


def unlearning_update(
    fisher: Fisher, gradient: Mapping[str, Tensor], *, alpha: float, training_size: int
) -> dict[str, Tensor]:
    """Return Delta theta = (alpha / N) F^-1 grad L(z_hat, theta_0), by layer name, each (d_out, d_in).

    Source: Wang et al., "Data attribution for text-to-image models by unlearning synthesized images" (2024), Eq. 5.
    """
    return {name: fisher.solve(name, layer) * (alpha / training_size) for name, layer in gradient.items()}


def expected_spread(fisher: Fisher, update: Mapping[str, Tensor]) -> float:
    """Return sqrt(Delta theta^T F Delta theta): the deviation of <grad L(z, t, eps), Delta theta> over training rows.

    F is the mean of grad grad^T over (training image, timestep, noise), so this is the root mean square of one row's
    first-order score. Scores of one query at several checkpoints are of one size when they are divided by it.
    """
    return sum(fisher.quadratic(name, layer) for name, layer in update.items()) ** 0.5


@contextmanager
def moved(layers: Mapping[str, Layer], update: Mapping[str, Tensor]) -> Iterator[None]:
    """Set the layers' weights to theta_0 + update inside the block."""
    original = {
        parameter: parameter.detach().clone() for name in update for parameter in layers[name].parameters(recurse=False)
    }
    try:
        for name, change in update.items():
            add_to_weights(layers[name], change)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in original.items():
                parameter.copy_(value)


def compress(update: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """Factor each layer's update into two thin matrices, the best of that rank (Eckart & Young, 1936).

    Returns:
        `<layer>/left` (d_out, r) and `<layer>/right` (r, d_in), or `<layer>` itself where that is smaller; and the
        relative error of the whole update in the Frobenius norm.
    """
    kept: dict[str, Tensor] = {}
    lost = total = 0.0
    for name, change in update.items():
        total += change.double().square().sum().item()
        if rank * sum(change.shape) >= change.numel():
            kept[name] = change
            continue
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        kept[f"{name}/left"] = left[:, :rank] * values[:rank]
        kept[f"{name}/right"] = right[:rank]
        lost += values[rank:].double().square().sum().item()
    return kept, (lost / total) ** 0.5 if total else 0.0


def expand(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `compress`, up to its error; leading dimensions are batched."""
    update = {name: tensor for name, tensor in kept.items() if "/" not in name}
    for key, left in kept.items():
        name, _, side = key.partition("/")
        if side == "left":
            update[name] = left @ kept[f"{name}/right"]
    return update
