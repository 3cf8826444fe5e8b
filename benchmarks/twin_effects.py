"""Are the twins that a teacher does not find among what made the picture? Against models trained again.

Takes a finished run with a judge (`fastgda demo --judge`). The effect of a training sample on a query is the difference
of the query's loss between models that were trained on it and models that were not. For every query that was generated
from a training caption it is taken from the pool of random halves, and for some of them (`--without NUMBER ...`, as
numbered in the first table) from models trained on all samples and on all but the twin, from the same seeds. These are
kept in the workspace, model by model.

Run: python benchmarks/twin_effects.py CONFIG [--without 8 10 11] [--seeds 8]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.judged_teachers import World
from fastgda_core.evaluation.lds import inclusion_effects
from fastgda_core.evaluation.ranking_metrics import twin_ranks
from flows.curation import plan_run
from storage_schemas.tables import TWIN
from tasks.config.files import load_config
from tasks.distilling.publish import rank_scores
from tasks.judging.methods import teacher_scores
from tasks.teaching.pool import Reason, Retraining
from tasks.teaching.retrainings import RetrainingParts


class WithoutTwins(RetrainingParts):
    """Models of all samples, and of all but one, from several seeds."""

    def __init__(self, world: World, removed: list[int], seeds: int) -> None:
        parts = world.parts
        super().__init__(parts.context, parts.samples, parts.latents, parts.queries, parts.artifact)
        self.config = self.config.model_copy(update={"regenerate": False})
        self.removed, self.seeds = removed, seeds

    def _pool(self) -> list[Retraining]:
        return [each for each, _ in self.reasons()]

    def reasons(self) -> list[tuple[Retraining, Reason]]:
        several: list[tuple[int, ...]] = [(), *((train_id,) for train_id in self.removed)]
        return [(Retraining(seed, removed=removed), Reason()) for seed in range(self.seeds) for removed in several]


def of_halves(world: World, scores: Tensor) -> None:
    """Print what the pool says of each twin: its effect, where that stands among all samples', and its rank."""
    effects, errors = inclusion_effects(world.kept, world.losses)
    ranks = twin_ranks(scores, world.twins).tolist()
    print("| | query | rank of its twin | effect by random halves | rank of that effect |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for number, (query, twin) in enumerate(zip(world.of_split[TWIN], world.twins.tolist(), strict=True)):
        effect, error, mine = effects[query], errors[query], world.several[query]
        place = 1 + int((effect < effect[twin]).sum())
        told = f"{100 * effect[twin]:+.1f} ± {100 * error[twin]:.1f} %"
        print(f"| {number} | {mine.caption} | {ranks[number]} | {told} | {place} |")


def of_removals(world: World, chosen: list[int], seeds: int) -> None:
    """Print what the models without a twin say of it, seed by seed beside those of all samples."""
    parts = WithoutTwins(world, [int(world.twins[number]) for number in chosen], seeds)
    for number in parts.missing():
        parts.make(number)
    print(f"\n| query | effect by models without the twin, {seeds} seeds |\n| --- | ---: |")
    for number in chosen:
        query, twin = world.of_split[TWIN][number], int(world.twins[number])
        whole, without = (
            torch.stack([parts.losses_of(Retraining(seed, removed=removed)).mean(0)[query] for seed in range(seeds)])
            for removed in ((), (twin,))
        )
        effect = (whole - without) / whole.mean()
        error = effect.std() / seeds**0.5
        print(f"| {world.several[query].caption} | {100 * effect.mean():+.1f} ± {100 * error:.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--without", type=int, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    run = plan_run(load_config(arguments.config))
    world = World(run.context)
    world.introduce()
    names = [world.several[number].query_id for number in world.of_split[TWIN]]
    print()
    of_halves(world, teacher_scores(run, rank_scores.fn(run).artifact, names, left_out=0.0))
    if arguments.without:
        of_removals(world, arguments.without, arguments.seeds)


if __name__ == "__main__":
    main()
