"""Does the order of methods by a training step on what they name agree with that by models trained again? A table.

Takes a finished run with a judge (`fastgda demo --judge`). For each method and query the model takes a step on the
first k samples, and goes back. The length of the step is to be chosen on the validation queries, where the order of the
methods comes nearest to that by the linear datamodelling score.

Run: python benchmarks/tail_patch.py CONFIG
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from judged_teachers import World
from scipy import stats
from torch import Tensor

from fastgda_core.diffusion.objective import Objective
from fastgda_core.evaluation.counterfactual import loss_changes
from fastgda_core.evaluation.lds import linear_datamodelling
from fastgda_core.evaluation.retraining import query_losses
from fastgda_core.evaluation.tail_patch import TailPatch
from fastgda_core.teachers.micro_batch import MicroBatch
from tasks.config.files import load_config
from tasks.context import open_context

LENGTHS, FIRST, PAIRS = (1e-4, 3e-4, 1e-3), (1, 10), 16
TEACHERS = {  # of cross-attn-kv, damping 0.1
    "loss, final weights": (Objective.loss, 1.0, ""),
    "the same, negative ones 0": (Objective.loss, 1.0, ", negative ones 0"),
    "output norm, final weights": (Objective.output_norm, 1.0, ""),
    "loss, 25 % of the steps": (Objective.loss, 0.25, ""),
}


def methods(world: World) -> dict[str, Tensor]:
    """Return scores, (queries, samples), by method."""
    cheap = world.cheap()
    found = {name: cheap[name] for name in ("random", "captions", "features, centred")}
    models = world.models()
    for name, (objective, share, form) in TEACHERS.items():
        several = world.scores(objective, "cross-attn-kv", share, models[share])
        found[name] = next(each for setting, each in several if (setting.damping, setting.form) == (0.1, form))
    found["turned round: loss, 25 % of the steps"] = -found["loss, 25 % of the steps"]
    return found


def patched(world: World, patch: TailPatch, scores: Tensor, query: int) -> Tensor:
    """Return how far a query's loss falls, and rises after a step back, (first, lengths, 2)."""
    model, asked, samples = patch.model, world.several[query], world.block
    latent, words = model.encode_images([asked.image])[0], model.encode_captions([asked.caption])

    def measure(denoiser: torch.nn.Module) -> Tensor:
        how = {"owner": asked.owner, "seed": 0, "pairs": 128}
        return query_losses(model, denoiser, latent, words, **how, micro_batch=MicroBatch(128))[0][:, None]

    before, caption = measure(model.denoiser), torch.nonzero(samples.caption_number == 0).flatten()
    found = torch.zeros(len(FIRST), len(LENGTHS), 2, dtype=torch.float64)
    for row, k in enumerate(FIRST):
        first = scores[query].topk(k).indices
        condition = {name: rows[caption[first]] for name, rows in samples.condition.items()}
        step = patch.step(first, samples.latents[first, 0], condition)
        for column, length in enumerate(LENGTHS):
            changes = [loss_changes(patch.after(step, sign * length, measure), before) for sign in (1, -1)]
            found[row, column] = torch.cat([-changes[0], changes[1]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    world = World(open_context(load_config(parser.parse_args().config)))
    world.introduce()
    scores = methods(world)
    patch = TailPatch(world.context.model(), seed=0, pairs=PAIRS, micro_batch=MicroBatch(64))
    falls: dict[str, dict[str, Tensor]] = {}
    lds: dict[str, dict[str, float]] = {}
    for split in ("validation", "test"):
        mine = world.of_split[split]
        falls[split] = {
            name: torch.stack([patched(world, patch, each, query) for query in mine]) for name, each in scores.items()
        }
        lds[split] = {
            name: linear_datamodelling(world.kept, each[mine], world.losses[:, mine]).mean
            for name, each in scores.items()
        }
    print("\nSpearman of the methods' order with that by LDS: falls / rises\n")
    print(f"| split | k | {' | '.join(f'length {length:g}' for length in LENGTHS)} |")
    print(f"| --- | ---: |{' ---: |' * len(LENGTHS)}")
    for split, several in falls.items():
        for row, k in enumerate(FIRST):
            cells = []
            for column in range(len(LENGTHS)):
                both = [[float(each[:, row, column, way].mean()) for each in several.values()] for way in (0, 1)]
                orders = [stats.spearmanr(one, list(lds[split].values())).statistic for one in both]
                cells.append(f"{orders[0]:+.2f} / {orders[1]:+.2f}")
            print(f"| {split} | {k} | {' | '.join(cells)} |")
    print("\nTest queries, loss falls / rises by percent\n")
    heads = [f"k {k}, length {length:g}" for k in FIRST for length in LENGTHS]
    print(f"| | LDS | {' | '.join(heads)} |\n| --- | ---: |{' ---: |' * len(heads)}")
    for name, each in falls["test"].items():
        mean, error = 100 * each.mean(0), 100 * each.std(0) / len(each) ** 0.5
        cells = [
            f"{float(m[0]):+.2f} ± {float(e[0]):.2f} / {float(m[1]):+.2f} ± {float(e[1]):.2f}"
            for m, e in zip(mean.flatten(0, 1), error.flatten(0, 1), strict=True)
        ]
        print(f"| {name} | {lds['test'][name]:+.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
