"""The referee of the judges: exact influence through the training itself, for a few queries; a Markdown table.

Takes a finished run with a judge (`fastgda demo --judge`), repeats its training with all samples, and differentiates
test queries' final losses by the weight of every sample. Beside teachers and captions it is held against the retrained
models, and they against it: rank correlation, and how many of its first 20 samples are among theirs.

Run: python benchmarks/exact_influence.py CONFIG --queries 8
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from judged_teachers import World
from torch import Tensor

from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.training import DenoiserTrainer, DenoiserTraining
from fastgda_core.evaluation.exact_influence import exact_influence
from fastgda_core.evaluation.lds import linear_datamodelling, reliability
from fastgda_core.evaluation.ranking_metrics import recall, spearman, top_mask
from fastgda_core.evaluation.retraining import query_gradient, to_train
from fastgda_core.teachers.micro_batch import MicroBatch
from tasks.config.files import load_config
from tasks.context import open_context

FIRST = 20
TEACHERS = {  # the settings of docs/judges.md
    "AbU+ as published": (Objective.loss, 1.0, ""),
    "the same, negative scores 0": (Objective.loss, 1.0, ", negative ones 0"),
    "output norm": (Objective.output_norm, 1.0, ""),
    "loss at 25 % of the training": (Objective.loss, 0.25, ""),
}


def exact(world: World, queries: list[int]) -> Tensor:
    """Return the exact influence of every sample, (queries, samples); the derivatives' norms are printed."""
    config, model = world.parts.config, world.context.model()
    training = DenoiserTraining(**config.retrain.hyperparameters, seed=config.seed)
    denoiser = to_train(model, seed=config.seed, continued=False)
    trainer = DenoiserTrainer(denoiser, model.schedule, world.parts.data(), training)

    def gradients(average: Any) -> Tensor:
        several = [world.several[number] for number in queries]
        return torch.stack(
            [
                query_gradient(
                    model, average, model.encode_images([query.image])[0], model.encode_captions([query.caption]),
                    owner=query.owner, seed=config.seed, pairs=config.draws, micro_batch=MicroBatch(64),
                )
                for query in several
            ]
        )  # fmt: skip

    def look(step: int, norms: Tensor) -> None:
        if step in (training.steps - 1, 0) or step % 50 == 0:
            print(
                f"before step {step}: norms {float(norms.median()):.3g}, at most {float(norms.max()):.3g}", flush=True
            )

    started = time.process_time()
    found = exact_influence(trainer, gradients, look)
    print(f"{time.process_time() - started:.0f} CPU seconds for {len(queries)} queries", flush=True)
    return found


def row(world: World, queries: list[int], name: str, scores: Tensor, referee: Tensor) -> str:
    found = linear_datamodelling(world.kept, scores, world.losses[:, queries])
    alike = spearman(scores.double(), referee)
    shared = recall(scores.double(), top_mask(referee, FIRST), FIRST)
    cells = [f"{found.mean:+.3f} ± {found.over_queries:.3f} ± {found.over_models:.3f}"]
    cells += [f"{float(each.mean()):+.3f} ± {float(each.std()) / len(each) ** 0.5:.3f}" for each in (alike, shared)]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--queries", type=int, default=8)
    arguments = parser.parse_args()
    world = World(open_context(load_config(arguments.config)))
    queries = world.of_split["test"][: arguments.queries]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {packages}")
    referee, cheap = exact(world, queries), world.cheap()
    methods = {
        "exact influence": referee,
        "its positive part": referee.clamp_min(0),
        "its negative part": referee.clamp_max(0),
    }
    methods |= {name: cheap[name][queries] for name in ("random", "captions", "features, centred")}
    models = world.models()
    for name, (objective, share, form) in TEACHERS.items():
        found = world.scores(objective, "cross-attn-kv", share, models[share])
        methods[name] = next(
            scores[queries] for setting, scores in found if setting.damping == 0.1 and setting.form == form
        )
    ceiling = float(reliability(world.losses[: len(world.again)], world.again)[queries].mean())
    print(f"{len(queries)} test queries; what a score can reach: {ceiling:.3f}\n")
    print(f"| | LDS | Spearman with exact influence | of its first {FIRST} among the first {FIRST} |")
    print("| --- | ---: | ---: | ---: |")
    for name, scores in methods.items():
        print(row(world, queries, name, scores, referee))


if __name__ == "__main__":
    main()
