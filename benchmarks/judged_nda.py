"""Do shares of training patches tell the truth? The nda teacher against models trained again; a Markdown table.

Takes a finished run with a judge (`fastgda demo --judge`). Noise level, patch sizes and whether a sample counts with
few of its patches or all are chosen on the validation queries, among singles and the two-scale means; figures are of
the test queries, those of the twin test and training images as queries. Beside them stand what needs no teacher, AbU+
as published, and the sum over checkpoints, whose scores are those of the run in the workspace.

Run: python benchmarks/judged_nda.py CONFIG
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.judged_teachers import HEAD, SPLITS, World, ahead, mean_lds, row, scores_of
from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.objective import Objective
from fastgda_core.images import square
from fastgda_core.teachers.nda import PatchPlan, log_partitions, patch_scores
from storage_schemas import tables
from tasks.config.files import load_config
from tasks.context import open_context
from tasks.execution.plan import run_artifacts, run_name
from tasks.inputs.samples import readable_images_ahead

TIMESTEPS = (100, 200, 300, 400, 500)  # as published
# Most patches of a sample that count, noises a timestep: patches as many pixels a side, of 16, and timesteps.
GRIDS: dict[tuple[int | None, int], tuple[tuple[int, ...], tuple[int, ...]]] = {
    (100, 1): ((3, 5, 7, 11, 15, 6, 10, 14), TIMESTEPS),
    (None, 1): ((3, 5), (200, 500)),  # of larger ones a picture has hardly more than 100 alike
    (100, 8): ((6, 14), (100, 200, 500)),
}
PUBLISHED = ((100,), (7, 14), 100, 1)  # the defaults of the teacher

Setting = tuple[tuple[int, ...], tuple[int, ...], int | None, int]


class Patches:
    """Scores of the queries of some splits by any setting, in the pictures that the model sees."""

    def __init__(self, world: World, splits: Sequence[str]) -> None:
        self.world, model = world, world.context.model()
        self.asked_for = [number for split in splits for number in world.of_split[split]]
        samples = readable_images_ahead(world.samples.path, list(range(world.samples.rows)), 64)
        self.kept = self._pictures([image for images, _ in samples for image in images], model.resolution)
        self.asked = self._pictures([world.several[number].image for number in self.asked_for], model.resolution)
        self.schedule = model.schedule

    def scores(self, setting: Setting) -> Tensor:
        """Return scores, (queries, samples) float64: 0 for queries of other splits."""
        timesteps, sizes, matches, draws = setting
        plan = PatchPlan(timesteps, sizes, matches, draws=draws)
        partitions = log_partitions(plan, self.schedule, self.asked, [self.kept])
        found = torch.zeros(len(self.world.several), len(self.kept), dtype=torch.float64)
        found[self.asked_for] = patch_scores(plan, self.schedule, self.asked, partitions, self.kept)
        return found

    def _pictures(self, images: list[Image.Image], side: int) -> Tensor:
        pixels = np.stack([np.asarray(square(image, side)) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def chosen(world: World) -> Setting:
    """Return the setting whose LDS on the validation queries is largest, and print the grid."""
    patches = Patches(world, ["validation"])
    found: dict[Setting, Tensor] = {}
    for (matches, draws), (sizes, timesteps) in GRIDS.items():
        print(f"\n{draws} draws, matches {matches or 'all'}, validation LDS by timestep\n")
        print(f"| size | {' | '.join(map(str, timesteps))} |\n| ---: |{' ---: |' * len(timesteps)}")
        for size in sizes:
            for at in timesteps:
                found[(at,), (size,), matches, draws] = patches.scores(((at,), (size,), matches, draws))
            cells = [mean_lds(world, found[(at,), (size,), matches, draws], "validation") for at in timesteps]
            print(f"| {size} | {' | '.join(f'{cell:+.3f}' for cell in cells)} |", flush=True)
        odd, even = ([size for size in sizes if size % 2 == rest] for rest in (1, 0))
        for first, second, at in itertools.product(odd, even, timesteps):  # two scales, as published
            both = (found[(at,), (size,), matches, draws] for size in (first, second))
            found[(at,), (first, second), matches, draws] = sum(both, torch.zeros(())) / 2
    return max(found, key=lambda each: mean_lds(world, found[each], "validation"))


def rivals(world: World) -> dict[str, Tensor]:
    """Return scores of what stands beside: nothing, captions, features, AbU+ as published, the sum over checkpoints."""
    found = world.cheap()
    model = world.context.model()
    fisher = world.fisher(model, list(select_layers(model.denoiser, "cross-attn-kv")))
    _, _, published = next(scores_of(fisher, world.rotated(model.with_objective(Objective.loss), fisher), (0.1,)))
    run = run_name(world.context, run_artifacts(world.context, world.samples, world.queries))
    table = tables.read_parts(world.context.workspace.scores(run), tables.SCORES)
    numbers = {query.query_id: number for number, query in enumerate(world.several)}
    taught = torch.full((len(world.several), world.samples.rows), torch.nan, dtype=torch.float64)
    rows = [numbers[name] for name in table["query_id"].to_pylist()]
    taught[rows, table["train_id"].to_pylist()] = torch.from_numpy(table["score"].to_numpy()).double()
    assert taught.isfinite().all(), "the run is not complete: run `fastgda demo --judge`"
    return {**found, "AbU+ as published": published, "the sum over checkpoints": taught}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    world = World(open_context(load_config(parser.parse_args().config)))
    world.introduce()
    best = chosen(world)
    patches = Patches(world, SPLITS)
    started = time.monotonic()
    published = patches.scores(PUBLISHED)
    each = (time.monotonic() - started) / len(patches.asked)
    print(f"\nas published: {each:.2f} s a query, {torch.get_num_threads()} threads")
    started = time.monotonic()
    mine = patches.scores(best)
    print(f"chosen: {(time.monotonic() - started) / len(patches.asked):.2f} s a query")
    others = rivals(world)
    print(f"\n{HEAD}")
    for name, scores in {"as published": published, f"**chosen on validation: {best}**": mine, **others}.items():
        print(row(world, name, scores), flush=True)
    for split, (name, scores) in itertools.product(SPLITS[1:], others.items()):
        print(f"\nahead of {name}, {split}: {ahead(world.lead(mine, scores, split))}", flush=True)


if __name__ == "__main__":
    main()
