"""Standard errors of scores: how near the true noise they are, and what they cost; Markdown tables.

Takes the data, model and Fisher of a first-order config, and makes what is missing in its workspace. The truth is the
variance of scores over noise plans of other seeds.

Run: python benchmarks/score_errors.py CONFIG
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from stages import make_latents
from torch import Tensor

from fastgda_core.curvature.fisher import load_fisher
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.teachers.scores import Scores, first_order_scores, first_order_scores_and_errors
from storage_schemas.files import local_copy
from tasks.config.files import load_config
from tasks.context import Context, open_context
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tasks.teaching.curvature import make_curvature
from tasks.teaching.latents import load_block
from tasks.teaching.updates import gradient_of, update_of

GRID = 10  # timesteps of the plans whose timesteps are put into groups
ROUNDS = 5


class Bench:
    def __init__(self, context: Context, samples: int, queries: int) -> None:
        self.context = context
        ingested = ingest_samples.fn(context).artifact
        latents = make_latents(context, ingested)
        path = local_copy(make_curvature(context, latents).path)
        fisher = load_fisher(path, context.config.teacher.damping).to(context.device)
        several = load_queries(make_queries.fn(context, ingested).artifact)[:queries]
        steps = [update_of(context, gradient_of(context, query, 0), fisher, ingested.rows) for query in several]
        self.steps = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        train_ids = np.sort(np.random.default_rng(1).choice(ingested.rows, samples, replace=False))
        self.block = load_block(context, latents, train_ids.tolist())
        self.model = context.teacher_model()
        self.layers = context.layers(self.model)
        self.size = context.micro_batch("gradients")

    def scores(self, plan: NoisePlan) -> Tensor:
        return first_order_scores(self.model, self.layers, plan, self.block, [self.steps], self.size)

    def scores_and_errors(self, plan: NoisePlan) -> Scores:
        return first_order_scores_and_errors(self.model, self.layers, plan, self.block, [self.steps], self.size)


def show_row(name: str, values: Tensor, errors: Tensor) -> None:
    """Compare errors, (seeds, queries, samples), with the spread of the scores, of the same shape."""
    variance, estimate = values.var(0), errors.square().mean(0)
    by_sample = estimate.mean(0) / variance.mean(0)
    within = ((values - values.mean(0)).abs() < 2 * errors).double().mean()
    varies = (errors.std(0) / errors.mean(0)).mean()
    noise = variance.mean() / values.mean(0).var(1).mean()
    print(
        f"| {name} | {noise:.4f} | {estimate.mean() / variance.mean():.2f} | {by_sample.mean():.2f} ± "
        f"{by_sample.std() / len(by_sample) ** 0.5:.2f} | {varies:.0%} | {within:.2f} |"
    )


def show_errors(bench: Bench, seeds: int) -> None:
    print("| groups of | noise / variance of scores | squared error / noise | by sample | varies by | within two |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for draws in (2, 4):
        plans = [NoisePlan(seed=100 + seed, timesteps=2, draws=draws, first_timestep=250) for seed in range(seeds)]
        found = [bench.scores_and_errors(plan) for plan in plans]
        values, errors = (torch.stack([getattr(each, name) for each in found]) for name in ("values", "errors"))
        show_row(f"{draws} draws at each of 2 timesteps", values, errors)
    stride = 1000 // GRID
    parts = torch.stack(
        [
            torch.stack([bench.scores(NoisePlan(seed=seed, timesteps=(t,), draws=1)) for t in range(0, 1000, stride)])
            for seed in range(seeds)
        ]
    )
    values = parts.mean(1)
    for count in (2, 5):  # of equal size
        means = parts.unflatten(1, (-1, count)).mean(1)
        show_row(f"{GRID} timesteps dealt out to {count}, 1 draw", values, means.std(1) / count**0.5)


def show_costs(bench: Bench) -> None:
    print("\n| timesteps | draws | seconds with errors / without |\n| ---: | ---: | ---: |")
    for timesteps, draws in ((1, 1), (1, 2), (1, 4), (5, 2)):
        plan = NoisePlan(seed=0, timesteps=timesteps, draws=draws)
        with_errors, without = [], []
        for _ in range(ROUNDS):
            with_errors.append(seconds_of(lambda plan=plan: bench.scores_and_errors(plan)))
            without.append(seconds_of(lambda plan=plan: bench.scores(plan)))
        print(f"| {timesteps} | {draws} | {min(with_errors) / min(without):.2f} |")


def seconds_of(compute: Callable[[], object]) -> float:
    """Return CPU seconds: other work on the machine does not count."""
    started = time.process_time()
    compute()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--without-costs", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(open_context(load_config(arguments.config)), arguments.samples, arguments.queries)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {bench.context.device}"
    print(f"{machine}, Python {platform.python_version()}, {packages}")
    print(f"{arguments.samples} samples, {len(next(iter(bench.steps.values())))} queries, {arguments.seeds} seeds\n")
    show_errors(bench, arguments.seeds)
    if not arguments.without_costs:
        show_costs(bench)


if __name__ == "__main__":
    main()
