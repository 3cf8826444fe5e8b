"""Does a pilot expect what is measured? The plan chosen for each mark, and how two such plans agree; a Markdown table.

Takes a run's data, model, queries and unlearning steps. For each objective and mark the pilot chooses a plan by 128
samples; then two plans of other seeds score all samples, and the rank correlation of each query's scores is measured.

Run: python benchmarks/noise_pilot.py CONFIG
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgda_core.diffusion.objective import Objective
from fastgda_core.evaluation.ranking_metrics import spearman
from fastgda_core.teachers.noise_pilot import PILOT_DRAWS, Rung, cheapest, ladder, pilot_scores, pilot_timesteps
from fastgda_core.teachers.scores import first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock
from storage_schemas.tables import PSEUDO, TWIN
from tasks.config.files import load_config
from tasks.context import Context, open_context
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tasks.teaching.curvature import make_curvature
from tasks.teaching.latents import latents_of, load_block
from tasks.teaching.noise import noise_plan, planned
from tasks.teaching.noise_pilot import PILOT_SAMPLES
from tasks.teaching.updates import device_fisher, gradient_of, update_of

MARKS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


class Measured:
    """One objective on a run's data: its pilot, and what plans then do on all samples."""

    def __init__(self, context: Context, objective: Objective, rows: int) -> None:
        teacher = context.config.teacher.model_copy(
            update={"objective": objective, "timesteps": 10, "draws": 1, "negatives": "keep"}
        )
        self.context = Context(context.config.model_copy(update={"teacher": teacher}), context.model_hash)
        samples = ingest_samples.fn(self.context).artifact
        queries = make_queries.fn(self.context, samples).artifact
        latents = latents_of(self.context, samples)
        fisher = device_fisher(self.context, make_curvature(self.context, latents))
        asked = [query for query in load_queries(queries) if query.split not in (TWIN, PSEUDO)]
        several = [
            update_of(self.context, gradient_of(self.context, query, 0), fisher, samples.rows) for query in asked
        ]
        self.updates = {name: torch.stack([each[name] for each in several]) for name in several[0]}
        draw = np.random.default_rng(0)
        chosen = np.sort(draw.choice(samples.rows, min(PILOT_SAMPLES, samples.rows), replace=False))
        every = np.sort(draw.choice(samples.rows, min(rows, samples.rows), replace=False))
        self.pilot, self.block = (load_block(self.context, latents, each.tolist()) for each in (chosen, every))

    def rungs(self) -> list[Rung]:
        model, train_timesteps = self.context.teacher_model(), self.context.model().schedule.train_timesteps
        grid = pilot_timesteps(train_timesteps)
        plan, size = noise_plan(planned(self.context.config, grid, PILOT_DRAWS)), self.context.micro_batch("gradients")
        scores = pilot_scores(model, self.context.layers(model), plan, self.pilot, [self.updates], size)
        common = self.context.config.teacher.objective is Objective.ratio
        return ladder(scores, train_timesteps, tied=False, common=common)

    def scores(self, timesteps: tuple[int, ...], draws: int, seed: int, block: SampleBlock) -> Tensor:
        model, plan = self.context.teacher_model(), noise_plan(planned(self.context.config, timesteps, draws), seed)
        size = self.context.micro_batch("gradients")
        return first_order_scores(model, self.context.layers(model), plan, block, [self.updates], size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--samples", type=int, default=256, help="that are scored twice")
    arguments = parser.parse_args()
    context = open_context(load_config(arguments.config))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {packages}\n")
    print("| objective | asked | timesteps | draws | forwards | expected | measured | with the schedule's mean |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for objective in Objective:
        one = Measured(context, objective, arguments.samples)
        rungs = one.rungs()
        truth = one.scores(tuple(pilot_timesteps(context.model().schedule.train_timesteps)), 8, 103, one.block)
        known: dict[Rung, tuple[Tensor, Tensor]] = {}
        for mark in MARKS:
            rung = cheapest(rungs, mark)
            if rung is None:
                best = max(each.of_schedule for each in rungs)
                print(f"| {objective} | {mark} | refused: at most {best:.2f} | | | | | |", flush=True)
                continue
            if rung not in known:
                pair = [one.scores(rung.timesteps, rung.draws, seed, one.block) for seed in (101, 102)]
                known[rung] = spearman(*pair), (spearman(pair[0], truth) + spearman(pair[1], truth)) / 2
            again, mean = known[rung]
            print(
                f"| {objective} | {mark} | {len(rung.timesteps)} | {rung.draws} | {rung.forwards} "
                f"| {rung.agreement:.3f} | {again.mean():.3f} ± {again.std() / len(again) ** 0.5:.3f} "
                f"| {mean.mean():.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
