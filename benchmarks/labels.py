"""What better labels are worth: agreement with the truth of scores under more noise, and its cost; a Markdown table.

Takes the data, model and settings of a first-order config, and makes what is missing in its workspace. The truth of a
query is its score under many independent copies of the noise plan: once with the run's own step, so that the samples'
noise alone counts, and once with a step from more of the query's (eps, t) pairs. Errors are over queries.

Run: python benchmarks/labels.py CONFIG
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from stages import make_latents
from torch import Tensor

from fastgda_core.curvature.fisher import load_fisher
from fastgda_core.evaluation.ranking_metrics import average_precision, spearman, top_mask
from fastgda_core.teachers.scores import first_order_scores
from storage_schemas.files import local_copy
from tasks.config.files import load_config
from tasks.context import Context, open_context
from tasks.inputs.queries import Query, load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tasks.teaching.curvature import make_curvature
from tasks.teaching.latents import load_block
from tasks.teaching.noise import noise_plan
from tasks.teaching.updates import gradient_of, update_of

CUTOFF = 100  # of all samples; scaled where only some are scored
SELF_CONSISTENCY = 256  # samples that the check scores again, as configured by default
REFINED = 0.05  # of the samples, the first of each query
MORE = 3  # further copies of the plan for what is refined
TRUTH = 8  # copies of the plan
TRUE_PAIRS = 4  # times the pairs of a query's gradient


class Bench:
    """Scores of some samples under independent copies of the plan."""

    def __init__(self, context: Context, samples: int, queries: int) -> None:
        self.context = context
        self.samples = ingest_samples.fn(context).artifact
        made = make_queries.fn(context, self.samples).artifact
        self.queries = [query for query in load_queries(made) if query.split == "test"][:queries]
        latents = make_latents(context, self.samples)
        path = local_copy(make_curvature(context, latents).path)
        self.fisher = load_fisher(path, context.config.teacher.damping).to(context.device)
        draw = np.random.default_rng(0)
        train_ids = np.sort(draw.choice(self.samples.rows, min(samples, self.samples.rows), replace=False))
        self.again = torch.from_numpy(draw.random(len(train_ids)) < SELF_CONSISTENCY / self.samples.rows)
        self.block = load_block(context, latents, train_ids.tolist())
        self.model = context.teacher_model()
        self.layers = context.layers(self.model)
        self.cutoff = round(CUTOFF * len(train_ids) / self.samples.rows)

    def steps(self) -> list[dict[str, Tensor]]:
        """Return the unlearning steps by layer: the run's, from twice as many pairs, and for the truth."""
        several = [self._steps(query) for query in self.queries]
        return [{name: torch.stack([each[k][name] for each in several]) for name in several[0][k]} for k in range(3)]

    def _steps(self, query: Query) -> list[dict[str, Tensor]]:
        seed = self.context.config.teacher.seed
        draws = [gradient_of(self.context, query, seed + number) for number in range(2 + TRUE_PAIRS)]
        means = [
            {name: torch.stack([each[name] for each in some]).mean(0) for name in some[0]}
            for some in (draws[:1], draws[:2], draws[2:])
        ]
        return [update_of(self.context, mean, self.fisher, self.samples.rows) for mean in means]

    def copies(self) -> Tensor:
        """Return scores, (copies, 3, queries, samples): the run's own plan, then others."""
        steps, seed = self.steps(), self.context.config.teacher.seed
        size, several = self.context.micro_batch("gradients"), []
        for copy in range(1 + MORE + TRUTH):
            plan = noise_plan(self.context.config, seed + 1000 * copy)
            scores = first_order_scores(self.model, self.layers, plan, self.block, steps, size)
            several.append(scores.unflatten(0, (3, -1)))
        return torch.stack(several)


def labels_by_way(bench: Bench, copies: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Return the labels of each way, (queries, samples), and the plan's copies that it takes of each sample."""
    run, doubled = copies[0, 0], copies[:2, 0].mean(0)
    refined = top_mask(run, round(REFINED * run.shape[1])).any(0)
    more = copies[: 1 + MORE, 0].mean(0)
    share, checked = refined.double().mean().item(), bench.again.double().mean().item()
    return {
        "the run's labels": (run, 1),
        "averaged with the self-consistency check's": (torch.where(bench.again, doubled, run), 1 + checked),
        f"the first {REFINED:.0%} of each query under {1 + MORE} copies of the plan": (
            torch.where(refined, more, run),
            1 + MORE * share,
        ),
        "the plan doubled": (doubled, 2),
        f"the plan {1 + MORE} times": (more, 1 + MORE),
        "the run's plan, the query's pairs doubled": (copies[0, 1], 1),
    }


def show(bench: Bench, copies: Tensor) -> None:
    truths = copies[1 + MORE :, [0, 2]].mean(0)
    ways = labels_by_way(bench, copies)
    print("| labels | forwards a sample | Spearman | mAP | gain | Spearman, true step too | mAP | gain |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    first: list[Tensor] = []
    for name, (labels, plans) in ways.items():
        cells = [f"{name} | {plans * rows_of_plan(bench.context):.2f}"]
        for number, truth in enumerate(truths):
            precision = average_precision(labels, top_mask(truth, bench.cutoff))
            if len(first) <= number:
                first.append(precision)
            gain = mean_and_error(precision - first[number])
            cells.append(f"{spearman(truth, labels).mean():.4f} | {mean_and_error(precision)} | {gain}")
        print(f"| {' | '.join(cells)} |")


def mean_and_error(values: Tensor) -> str:
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def rows_of_plan(context: Context) -> int:
    plan = noise_plan(context.config)
    return len(plan.timestep_values(context.teacher_model().schedule.train_timesteps)) * plan.draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--queries", type=int, default=40)
    arguments = parser.parse_args()
    bench = Bench(open_context(load_config(arguments.config)), arguments.samples, arguments.queries)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {bench.context.device}"
    print(f"{machine}, Python {platform.python_version()}, {packages}")
    print(f"{len(bench.block.train_ids):,} of {bench.samples.rows:,} samples, {len(bench.queries)} test queries")
    copies = bench.copies()
    refined = top_mask(copies[0, 0], round(REFINED * copies.shape[-1])).any(0).double().mean()
    print(f"mAP({bench.cutoff}); the first {REFINED:.0%} of all queries together are {refined:.0%} of the samples\n")
    show(bench, copies)


if __name__ == "__main__":
    main()
