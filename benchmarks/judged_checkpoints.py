"""Is a sum over checkpoints of the training truer than one of them? Against models that were trained again.

Takes a finished run with a judge, as `judged_teachers.py` does. Scores are made at several shares of the training, with
both objectives, under some dampings. Sums of two and three add scores of one size: each query's are divided by
sqrt(step' F step), which needs no pilot and is what `teacher.checkpoints` does, or by their measured deviation over the
samples. What is best is chosen on the validation queries; the table has the best of each kind, with its errors.

Run: python -m benchmarks.judged_checkpoints CONFIG
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.judged_teachers import HEAD, SPLITS, World, ahead, mean_lds, row
from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.objective import Objective
from tasks.config.files import load_config
from tasks.context import open_context

SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)
OBJECTIVES = Objective.loss, Objective.output_norm  # the ratio is judged apart
DAMPINGS = (0.01, 0.1, 1.0)
LAYERS = "cross-attn-kv"
MOST = 3  # places of a sum


class Place(NamedTuple):
    objective: Objective
    share: float

    def __str__(self) -> str:
        return f"{self.objective} at {self.share:.4g}"


class Placed(NamedTuple):
    """Scores, (queries, samples), and what each query's may be divided by, (queries, 1)."""

    scores: Tensor
    expected: Tensor
    measured: Tensor


def at_places(world: World) -> Iterator[tuple[tuple[Place, float], Placed]]:
    """Yield the scores at each place under each damping."""
    for share, model in world.models(SHARES).items():
        fisher = world.fisher(model, list(select_layers(model.denoiser, LAYERS)))
        for objective in OBJECTIVES:
            both = world.rotated(model.with_objective(objective), fisher)
            for damping in DAMPINGS:
                total = torch.zeros(len(world.several), world.samples.rows, dtype=torch.float64)
                square = torch.zeros(len(world.several), dtype=torch.float64)
                for name, (of_queries, of_samples) in both.items():
                    factors = fisher.layers[name]
                    steps = of_queries / factors.damped(damping).flatten().float()
                    total += (steps @ of_samples.T).double()
                    square += (steps.double().square() * factors.eigenvalues.flatten()).sum(1)
                yield (Place(objective, share), damping), Placed(total, square.sqrt()[:, None], total.std(1)[:, None])


def sums(found: dict[tuple[Place, float], Placed]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield a kind, a name and the scores of every sum."""
    places = sorted({place for place, _ in found})
    for damping, count in itertools.product(DAMPINGS, range(1, MOST + 1)):
        for chosen in itertools.combinations(places, count):
            name = f"{' + '.join(map(str, chosen))}, damping {damping:g}"
            if count == 1:
                yield f"one place, {chosen[0].objective}", name, found[chosen[0], damping].scores
                continue
            mixed = "both objectives" if len({place.objective for place in chosen}) > 1 else chosen[0].objective
            for divisor in ("expected", "measured"):
                parts = [found[place, damping] for place in chosen]
                total = torch.stack([part.scores / getattr(part, divisor) for part in parts]).sum(0)
                yield f"{count} places, {mixed}, {divisor} spread", name, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    world = World(open_context(load_config(parser.parse_args().config)))
    world.introduce()
    print(f"\n{HEAD}")
    found = dict(at_places(world))
    best: dict[str, tuple[float, str, Tensor]] = {}
    tried = 0
    for kind, name, scores in sums(found):
        reached, tried = mean_lds(world, scores, "validation"), tried + 1
        if kind not in best or reached > best[kind][0]:
            best[kind] = (reached, name, scores)
    for share in SHARES:
        print(row(world, f"loss at {share:.4g}, damping 1", found[Place(Objective.loss, share), 1.0].scores))
    for kind, (_, name, scores) in sorted(best.items()):
        print(row(world, f"{kind}: {name}", scores), flush=True)
    pair = best["2 places, loss, expected spread"]
    print(f"\nbest of {tried} by the validation queries of each kind; ahead of the best single place with the loss:")
    for split in SPLITS[1:]:
        lead = world.lead(pair[2], best["one place, loss"][2], split)
        print(f"{pair[1]}, {split}: {ahead(lead)}")


if __name__ == "__main__":
    main()
