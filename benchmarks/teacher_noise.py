"""How noisy the teacher is, and what each way to less noise costs; prints Markdown tables.

Scores some samples of a config's data against all its queries at many timesteps with independent noise, then asks of
each noise plan: do two independent copies agree, and does one agree with the mean over everything?

Run: python benchmarks/teacher_noise.py [CONFIG]
Without a config: the demo's data and model.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from allocation import allocate_timesteps
from stages import make_latents
from torch import Tensor

from fastgda_core.curvature.fisher import load_fisher
from fastgda_core.diffusion.model import model_hash
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.evaluation.ranking_metrics import average_precision, spearman, top_mask
from fastgda_core.teachers.scores import first_order_scores
from flows.demo import prepare
from tasks.config.files import load_config
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tasks.teaching.curvature import make_curvature
from tasks.teaching.latents import load_block
from tasks.teaching.updates import gradient_of, update_of

GRID = 20  # timesteps measured
COPIES = 4  # independent draws at each; the first two make the plans, the others the truth
POSITIVES = 0.05  # of the samples: L of mAP(L)
GRADIENT_PAIRS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Measured:
    """Scores of one draw, and of a draw with its negative: (copies, timesteps, queries, samples) each."""

    timesteps: Tensor
    single: Tensor
    pair: Tensor
    seconds_per_row: float


@dataclass(frozen=True)
class Plan:
    name: str
    timesteps: list[int]  # numbers in the measured grid
    weights: list[float]
    antithetic: bool
    draws: int = 1

    @property
    def rows(self) -> int:
        return len(self.timesteps) * self.draws * (1 + self.antithetic)

    def scores(self, measured: Measured, copy: int) -> Tensor:
        """(queries, samples) of an independent copy of the plan."""
        values = measured.pair if self.antithetic else measured.single
        mine = values[copy * self.draws : (copy + 1) * self.draws, self.timesteps].mean(0)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return torch.einsum("t,tqn->qn", weights / weights.sum(), mine)


def measure(context: Context, block, updates: list[dict[str, Tensor]], train_timesteps: int) -> Measured:
    model = context.teacher_model()
    layers, micro_batch = context.layers(model), context.micro_batch("gradients")
    stride = train_timesteps // GRID
    timesteps = torch.arange(stride // 2, train_timesteps, stride)
    started = time.monotonic()

    def scores(timestep: int, seed: int, antithetic: bool) -> Tensor:
        plan = NoisePlan(seed=seed, timesteps=(timestep,), draws=1 + antithetic, antithetic=antithetic)
        return first_order_scores(model, layers, plan, block, updates, micro_batch)

    single, pair = (
        torch.stack(
            [
                torch.stack([scores(timestep, 1000 + copy, antithetic) for timestep in timesteps.tolist()])
                for copy in range(COPIES)
            ]
        )
        for antithetic in (False, True)
    )
    rows = len(block.owner) * GRID * COPIES * 3
    return Measured(timesteps, single, pair, (time.monotonic() - started) / rows)


def even(count: int, **options) -> Plan:
    places = ((np.arange(count) + 0.5) * GRID / count).astype(int).tolist()
    kind = "antithetic pair" if options["antithetic"] else f"{options.get('draws', 1)} draw(s)"
    return Plan(f"{count} even timesteps, {kind}", places, [1.0] * count, **options)


def allocated(measured: Measured, count: int) -> Plan:
    values = measured.pair
    deviations = ((values[0] - values[1]).var(-1).mean(-1) / 2).sqrt().numpy()
    # In units of the measured grid: a plan can only be put together from what was measured.
    places, weights = allocate_timesteps(np.arange(GRID), deviations, count, GRID)
    return Plan(f"{len(places)} allocated timesteps, antithetic pair", places, weights, antithetic=True)


def plans(measured: Measured) -> Iterator[Plan]:
    for count in (1, 2, 5, 10, 20):
        yield even(count, antithetic=False)
    yield even(5, antithetic=False, draws=2)
    for count in (3, 5, 10):
        yield even(count, antithetic=True)
    for count in (3, 4, 5, 8, 10):
        yield allocated(measured, count)
    low, high = int(0.4 * GRID), int(0.925 * GRID)
    yield Plan("2 timesteps, 400 and 925 of 1000, antithetic pair", [low, high], [0.78, 0.22], antithetic=True)


def agreement(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Mean over queries of the rank correlation, and of the average precision of `second` for the top of `first`."""
    cutoff = max(1, round(POSITIVES * first.shape[1]))
    return spearman(first, second).mean().item(), average_precision(second, top_mask(first, cutoff)).mean().item()


def print_plans(measured: Measured, train_timesteps: int) -> None:
    truth = measured.pair[2:].mean((0, 1))
    print("| noise plan | forwards | ms per sample | Spearman | mAP | Spearman with the mean | mAP |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for plan in sorted(plans(measured), key=lambda plan: (plan.rows, plan.name)):
        first, second = (plan.scores(measured, copy) for copy in range(2))
        (rho, precision), (rho_truth, precision_truth) = agreement(first, second), agreement(truth, first)
        cost = 1000 * plan.rows * measured.seconds_per_row
        print(
            f"| {plan.name} | {plan.rows} | {cost:.0f} | {rho:.3f} | {precision:.3f} | {rho_truth:.3f} "
            f"| {precision_truth:.3f} |"
        )
    deviations = ((measured.pair[0] - measured.pair[1]).var(-1).mean(-1) / 2).sqrt().numpy()
    print("\nFor a config, timesteps as dense as the noise of an antithetic pair is large:\n")
    for count in (3, 5, 10):
        timesteps, weights = allocate_timesteps(measured.timesteps.numpy(), deviations, count, train_timesteps)
        print(f"    timestep_list: {timesteps}\n    timestep_weights: {[round(weight) for weight in weights]}")


def print_gradients(context: Context, curvature, queries, block, training_size: int) -> None:
    """Two independent sets of Monte-Carlo pairs behind each query's gradient, under one noise plan."""
    model = context.teacher_model()
    fisher = load_fisher(curvature.path).to(context.device)
    plan = NoisePlan(seed=5, timesteps=GRID // 2, draws=2, antithetic=True)
    print("\n| pairs in a query's gradient | s per query | Spearman | mAP |\n| ---: | ---: | ---: | ---: |")
    chosen = list(load_queries(queries))[:: max(1, queries.rows // 12)]
    updates, seconds = [], {}
    for pairs in GRADIENT_PAIRS:
        config = context.config.model_copy(
            update={"teacher": context.config.teacher.model_copy(update={"gradient_pairs": pairs})}
        )
        here = Context(config, context.model_hash)
        started = time.monotonic()
        for seed in (71, 72):
            several = [update_of(here, gradient_of(here, query, seed), fisher, training_size) for query in chosen]
            updates.append({name: torch.stack([one[name] for one in several]) for name in several[0]})
        seconds[pairs] = (time.monotonic() - started) / 2 / len(chosen)
    scores = first_order_scores(model, context.layers(model), plan, block, updates, context.micro_batch("gradients"))
    for number, pairs in enumerate(GRADIENT_PAIRS):
        first, second = scores[number * 2 * len(chosen) : (number + 1) * 2 * len(chosen)].chunk(2)
        rho, precision = agreement(first, second)
        print(f"| {pairs} | {seconds[pairs]:.2f} | {rho:.3f} | {precision:.3f} |")


def run(config: PipelineConfig, count: int) -> None:
    context = Context(config, model_hash(config.model.folder))
    samples = ingest_samples.fn(context).artifact
    queries = make_queries.fn(context, samples).artifact
    latents = make_latents(context, samples)
    curvature = make_curvature(context, latents)
    training_size = config.teacher.training_size or samples.rows
    train_ids = np.random.default_rng(11).choice(samples.rows, min(count, samples.rows), replace=False)
    block = load_block(context, latents, np.sort(train_ids).tolist())
    fisher = load_fisher(curvature.path).to(context.device)
    several = [
        update_of(context, gradient_of(context, query, 0), fisher, training_size) for query in load_queries(queries)
    ]
    updates = {name: torch.stack([one[name] for one in several]) for name in several[0]}
    train_timesteps = context.model().schedule.train_timesteps
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {context.device}, Python {platform.python_version()}"
    print(f"{machine}, {packages}")
    print(f"{len(block.train_ids)} samples, {queries.rows} queries, L = {POSITIVES:.0%} of the samples\n")
    measured = measure(context, block, [updates], train_timesteps)
    print_plans(measured, train_timesteps)
    print_gradients(context, curvature, queries, block, training_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("--samples", type=int, default=240)
    arguments = parser.parse_args()
    if arguments.config:
        run(load_config(arguments.config), arguments.samples)
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(load_config(prepare(Path(scratch))), arguments.samples)


if __name__ == "__main__":
    main()
