"""MUCS's ratio against models that were trained again: what of it tells the truth? Two Markdown tables.

Takes a finished run with a judge, as `judged_teachers.py` does. What MUCS does together is judged apart: each loss held
against its own size (the objective `ratio`), one noise for all samples, none of the less noisy 30 % of the timesteps.
And whether the query's gradient is that of its loss, as published, or of the loss's logarithm. Of each variant and
share of the training, damping and form are chosen on the validation queries.

Run: python benchmarks/judged_ratio.py CONFIG
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from judged_teachers import PAIRS, SPLITS, World, mean_lds, row
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher
from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import CommonNoisePlan, NoisePlan
from fastgda_core.diffusion.objective import Objective
from fastgda_core.evaluation.lds import difference
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import sample_gradients
from fastgda_core.teachers.unlearning import query_gradients
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
        self.layers: dict[str, Layer] = select_layers(model.denoiser, "cross-attn-kv")
        self.fisher: EkfacFisher = world.fisher(model, list(self.layers))
        self.asked = {objective: self._asked(objective) for objective in (Objective.loss, Objective.ratio)}

    def _asked(self, objective: Objective) -> dict[str, Tensor]:
        found, model = defaultdict[str, list[Tensor]](list), self.model.with_objective(objective)
        for query in self.world.several:
            gradient = query_gradients(
                model, self.layers, model.encode_images([query.image])[0], model.encode_captions([query.caption]),
                owner=query.owner, seed=0, pairs=PAIRS, groups=1, micro_batch=MicroBatch(PAIRS),
            )  # fmt: skip
            for name, each in gradient.items():
                found[name].append(self.fisher.layers[name].rotate(each).flatten(1))
        return {name: torch.cat(several) for name, several in found.items()}

    def scores(self, variant: Variant) -> Iterator[tuple[str, Tensor]]:
        """Yield scores of all samples, (queries, samples), under every damping, in three forms."""
        kept, model = defaultdict[str, list[Tensor]](list), self.model.with_objective(variant.objective)
        plan = variant.plan(model.schedule.train_timesteps)
        for some in sample_gradients(model, self.layers, plan, self.world.block, MicroBatch(64)):
            for name in self.layers:
                kept[name].append(some.rotated(name, self.fisher.layers[name]))
        for damping in DAMPINGS:
            total, length = torch.zeros(()), torch.zeros(())
            for name, several in kept.items():
                weight = self.fisher.layers[name].damped(damping).flatten().reciprocal()
                samples = torch.cat(several)
                total = total + ((self.asked[variant.asked][name] * weight) @ samples.T).double()
                length = length + (samples.square() * weight).sum(1).double()
            yield f"damping {damping:g}", total
            yield f"damping {damping:g}, negative ones 0", total.clamp_min(0)
            yield f"damping {damping:g}, divided by the sample's length", total / length.sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    world = World(open_context(load_config(parser.parse_args().config)))
    print("| | LDS, validation | test | generated from training captions | training images | twins first, worst |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
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
            mine = world.of_split[split]
            lead = difference(world.kept, scores[mine], best[PUBLISHED][mine], world.losses[:, mine])
            cells.append(f"{lead.mean:+.3f} ± {lead.over_queries:.3f} ± {lead.over_models:.3f}")
        print(f"| {variant} | {chosen[variant]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
