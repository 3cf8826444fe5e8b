"""The noise of the Fisher: how far scores agree whose curvature rests on other rows, everything else equal.

Prints a Markdown table over numbers of rows, even and weighted timesteps, dampings and objectives.

Run: python benchmarks/curvature_noise.py [FOLDER] [--samples N]
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from stages import make_latents
from torch import Tensor

from fastgda_core.curvature.fisher import load_fisher
from fastgda_core.diffusion.model import model_hash
from fastgda_core.diffusion.objective import Objective
from fastgda_core.evaluation.ranking_metrics import average_precision, spearman, top_mask
from fastgda_core.teachers.scores import first_order_scores
from flows.demo import prepare
from tasks.artifact import Artifact
from tasks.config.files import load_config
from tasks.config.teaching import CurvatureConfig
from tasks.context import Context
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tasks.teaching.curvature import make_curvature
from tasks.teaching.latents import load_block
from tasks.teaching.noise import noise_plan
from tasks.teaching.updates import gradient_of, update_of

ROWS, DAMPINGS, POSITIVES = (512, 2048), (0.1, 1.0, 10.0), 0.025
QUERIES = 24


def scores(
    context: Context, latents: Artifact, curvatures: list[Path], train_ids: list[int]
) -> dict[tuple[Path, float], Tensor]:
    """(queries, samples) by Fisher and damping, from one pass over the samples."""
    queries = [query for query in load_queries(_queries(context)) if query.split in ("train", "validation", "test")]
    gradients = [gradient_of(context, query, 0) for query in queries[:: len(queries) // QUERIES][:QUERIES]]
    places = [(path, damping) for path in curvatures for damping in DAMPINGS]
    updates = []
    for path, damping in places:
        fisher = load_fisher(path, damping).to(context.device)
        several = [update_of(context, gradient, fisher, latents.rows) for gradient in gradients]
        updates.append({name: torch.stack([one[name] for one in several]) for name in several[0]})
    model, micro_batch = context.teacher_model(), context.micro_batch("gradients")
    block = load_block(context, latents, train_ids)
    found = first_order_scores(model, context.layers(model), noise_plan(context.config), block, updates, micro_batch)
    return dict(zip(places, found.split(QUERIES), strict=True))


def _queries(context: Context) -> Artifact:
    return make_queries.fn(context, ingest_samples.fn(context).artifact).artifact


def with_objective(context: Context, objective: Objective) -> Context:
    teacher = context.config.teacher.model_copy(update={"objective": objective})
    return replace(context, config=context.config.model_copy(update={"teacher": teacher}))


def run(folder: Path, count: int) -> None:
    config = load_config(prepare(folder))
    context = Context(config, model_hash(config.model.folder))
    latents = make_latents(context, ingest_samples.fn(context).artifact)
    train_ids = np.sort(np.random.default_rng(11).choice(latents.rows, count, replace=False)).tolist()
    made: dict[tuple[int, bool], tuple[Path, Path]] = {}
    seconds: dict[tuple[int, bool], float] = {}
    for rows in ROWS:
        for importance in (False, True):
            started = time.monotonic()
            pair = []
            for seed in (1, 2):
                curvature = CurvatureConfig(samples=rows, importance=importance, seed=seed)
                here = replace(context, config=config.model_copy(update={"curvature": curvature}))
                pair.append(Path(str(make_curvature(here, latents).path)))
            made[rows, importance] = pair[0], pair[1]
            seconds[rows, importance] = (time.monotonic() - started) / 2
    paths = [path for pair in made.values() for path in pair]
    found = {
        objective: scores(with_objective(context, objective), latents, paths, train_ids) for objective in Objective
    }
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "kronfluence"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {context.device}, Python {platform.python_version()}"
    print(f"{machine}, {packages}")
    cutoff = max(1, round(POSITIVES * count))
    print(f"{count} samples, {QUERIES} queries; Spearman and mAP({cutoff}) between two Fishers\n")
    print(f"| rows | timesteps | s | damping | {' | '.join(f'`{name}`' for name in found)} |")
    print(f"| ---: | --- | ---: | ---: |{' ---: |' * len(found)}")
    for (rows, importance), (first, second) in made.items():
        for damping in DAMPINGS:
            cells = []
            for values in found.values():
                one, other = values[first, damping], values[second, damping]
                precision = average_precision(other, top_mask(one, cutoff)).mean()
                cells.append(f"{spearman(one, other).mean():.3f} / {precision:.3f}")
            how = "weighted" if importance else "even"
            print(f"| {rows} | {how} | {seconds[rows, importance]:.0f} | {damping:g} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    arguments = parser.parse_args()
    with nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.samples)


if __name__ == "__main__":
    main()
