"""MUCS's ratio against models that were trained again: what of it tells the truth? Two Markdown tables.

Takes a finished run with a judge, as `judged_teachers.py` does. What MUCS does together is judged apart: each loss held
against its own size (the objective `ratio`), one noise for all samples, none of the less noisy 30 % of the timesteps.
And whether the query's gradient is that of its loss, as published, or of the loss's logarithm. Of each variant and
share of the training, damping and form are chosen on the validation queries.

Run: python benchmarks/judged_ratio.py CONFIG
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from judged_teachers import HEAD, SPLITS, World, mean_lds, row, scores_of
from torch import Tensor

from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import CommonNoisePlan, NoisePlan
from fastgda_core.diffusion.objective import Objective
from tasks.config.files import load_config
from tasks.context import open_context

DAMPINGS = (0.01, 0.1, 1.0)
TIMESTEPS = 10
NOISIER = 0.7  # of the schedule, as in MUCS


@dataclass(frozen=True)
class Variant:
    """objective: of the samples; asked: of the query; common: one noise for all samples; noisier: of the timesteps."""

    objective: Objective
    asked: Objective
    common: bool
    noisier: bool

    def __str__(self) -> str:
        query = "" if self.asked is self.objective.of_query else ", query's gradient of the log loss"
        noise = "one noise for all" if self.common else "noise of its own"
        return f"{self.objective}{query}, {noise}, {'the noisier 70 %' if self.noisier else 'all timesteps'}"

    def plan(self, train_timesteps: int) -> NoisePlan:
        every = range(0, train_timesteps, train_timesteps // TIMESTEPS)
        chosen = tuple(t for t in every if not self.noisier or t >= (1 - NOISIER) * train_timesteps - 1e-9)
        return (CommonNoisePlan if self.common else NoisePlan)(seed=0, timesteps=chosen, draws=1)


VARIANTS = [
    Variant(Objective.loss, Objective.loss, False, False),
    Variant(Objective.loss, Objective.loss, True, False),
    Variant(Objective.loss, Objective.loss, False, True),
    Variant(Objective.ratio, Objective.loss, False, False),
    Variant(Objective.ratio, Objective.loss, True, False),
    Variant(Objective.ratio, Objective.loss, True, True),
    Variant(Objective.ratio, Objective.ratio, True, False),
    Variant(Objective.ratio, Objective.ratio, True, True),
]
PUBLISHED = VARIANTS[0]


class AtShare:
    """The model at one share of its training, with its Fisher and the queries' gradients."""

    def __init__(self, world: World, model: DiffusionModel) -> None:
        self.world, self.model = world, model
        self.fisher = world.fisher(model, list(select_layers(model.denoiser, "cross-attn-kv")))
        self.asked = {
            objective: world.of_queries(model.with_objective(objective), self.fisher)
            for objective in (Objective.loss, Objective.ratio)
        }

    def scores(self, variant: Variant) -> Iterator[tuple[str, Tensor]]:
        """Yield scores of all samples, (queries, samples), under every damping, in three forms."""
        model, plan = self.model.with_objective(variant.objective), variant.plan(self.model.schedule.train_timesteps)
        kept = self.world.of_samples(model, self.fisher, plan)
        both = {name: (self.asked[variant.asked][name], of_samples) for name, of_samples in kept.items()}
        for damping, form, found in scores_of(self.fisher, both, DAMPINGS):
            yield f"damping {damping:g}{form}", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    world = World(open_context(load_config(parser.parse_args().config)))
    print(HEAD)
    best: dict[Variant, Tensor] = {}
    chosen: dict[Variant, str] = {}
    for share, model in world.models().items():
        at, where = AtShare(world, model), "final weights" if share == 1 else f"{share:.0%} of the steps"
        for variant in VARIANTS:
            several = dict(at.scores(variant))
            name = max(several, key=lambda each: mean_lds(world, several[each], "validation"))
            print(row(world, f"{variant}, {where}, {name}", several[name]), flush=True)
            if variant not in best or mean_lds(world, several[name], "validation") > mean_lds(
                world, best[variant], "validation"
            ):
                best[variant], chosen[variant] = several[name], f"{where}, {name}"
    print("\n| chosen on validation | of | LDS, test | ahead of the loss's, test | training images |")
    print("| --- | --- | ---: | ---: | ---: |")
    for variant, scores in best.items():
        cells = [f"{mean_lds(world, scores, 'test'):+.3f}"]
        for split in (SPLITS[1], SPLITS[3]):
            lead = world.lead(scores, best[PUBLISHED], split)
            cells.append(f"{lead.mean:+.3f} ± {lead.over_queries:.3f} ± {lead.over_models:.3f}")
        print(f"| {variant} | {chosen[variant]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
