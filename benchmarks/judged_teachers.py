"""Which teacher tells the truth? Scores by many settings against models that were trained again; a Markdown table.

Takes a finished run with a judge (`fastgda demo --judge`): its pool of models trained on random halves, and their
losses on every query. Scores are made anew for each setting: whose gradients, in which layers, at which share of the
training the gradients, the Fisher and the query's gradient are taken, under which damping. What is best is chosen on
the validation queries and reported on the test queries and on those of the twin test, with errors over queries and
models.

Run: python benchmarks/judged_teachers.py CONFIG
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import EkfacFisher, Fisher, FisherKind, fit_fisher
from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stratified_timesteps, stream_key
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.training import DenoiserTrainer, DenoiserTraining
from fastgda_core.evaluation.lds import Lds, difference, linear_datamodelling, predictions, reliability
from fastgda_core.evaluation.ranking_metrics import spearman, twin_ranks
from fastgda_core.evaluation.retraining import to_train
from fastgda_core.features import text_space
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import sample_gradients
from fastgda_core.teachers.unlearning import query_gradients
from storage_schemas.tables import PSEUDO, TWIN
from tasks.config.files import load_config
from tasks.context import Context, open_context
from tasks.inputs.features import extract_features, in_space, load_features
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tasks.inputs.twins import load_twins
from tasks.teaching.latents import latents_of, load_block
from tasks.teaching.noise import noise_plan
from tasks.teaching.retrainings import RetrainingParts, judged_by

DAMPINGS = (0.001, 0.01, 0.1, 1.0, 10.0)
SHARES = (0.25, 0.5, 1.0)  # of the training, at which gradients are taken
FISHER_ROWS, PAIRS = 1024, 128
FRESH = 1000  # added to the seed of weights that no training began with
SPLITS = ("validation", "test", TWIN, PSEUDO)
HEAD = """| | LDS, validation | test | generated from training captions | training images | twins first, worst |
| --- | ---: | ---: | ---: | ---: | ---: |"""  # of a table of `row`


@dataclass(frozen=True)
class Setting:
    objective: Objective
    layers: str
    share: float
    damping: float
    form: str

    def __str__(self) -> str:
        where = "final weights" if self.share == 1 else f"{self.share:.0%} of the steps"
        return f"{self.objective}, {self.layers}, {where}, damping {self.damping:g}{self.form}"


class World:
    """The run, its pool, and its model at shares of the training."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.samples = ingest_samples.fn(context).artifact
        self.queries = make_queries.fn(context, self.samples).artifact
        latents = latents_of(context, self.samples)
        assert context.config.judge is not None
        pool = judged_by(context, context.config.judge, latents, self.queries, "")[RetrainingParts.kind]
        self.parts = RetrainingParts(context, self.samples, latents, self.queries, pool)
        assert not self.parts.missing(), "the pool is not complete: run `fastgda judge CONFIG`"
        config, losses = self.parts.config, [self.parts.losses(number).mean(0) for number in range(self.parts.count)]
        first, last = 1, 1 + config.subsets
        self.kept = torch.stack([each.kept(config, self.samples.rows) for each in self.parts.pool[first:last]])
        self.losses, self.again = torch.stack(losses[first:last]), torch.stack(losses[last:])
        several = load_queries(self.queries)
        self.of_split = {
            split: [number for number, query in enumerate(several) if query.split == split] for split in SPLITS
        }
        twins = load_twins(self.queries.path)
        self.twins = torch.tensor([twins[several[number].query_id] for number in self.of_split[TWIN]])
        self.several = several
        self.block = load_block(context, latents, list(range(self.samples.rows)))

    def models(self, shares: Sequence[float] = SHARES) -> dict[float, DiffusionModel]:
        """Return the averaged model at each share of the recipe's steps, in ascending order."""
        config, model = self.parts.config, self.context.model()
        denoiser = to_train(model, seed=config.seed, continued=False)
        data, training = self.parts.data(), DenoiserTraining(**config.retrain.hyperparameters, seed=config.seed)
        trainer = DenoiserTrainer(denoiser, model.schedule, data, training)
        found = {}
        for share in shares:
            ema = copy.deepcopy(trainer.run(round(share * training.steps)))
            found[share] = replace(model, denoiser=ema)
        return found

    def randomised(self) -> DiffusionModel:
        """Return the model with fresh weights: scores made of these have to lose their truth.

        Source: Adebayo et al., "Sanity checks for saliency maps" (2018).
        """
        model = self.context.model()
        denoiser = to_train(model, seed=self.parts.config.seed + FRESH, continued=False)
        return replace(model, denoiser=denoiser.eval())

    def fisher(self, model: DiffusionModel, names: list[str]) -> EkfacFisher:
        found = self.fisher_of_kind("ekfac", model, names)
        assert isinstance(found, EkfacFisher)
        return found

    def fisher_of_kind(self, kind: FisherKind, model: DiffusionModel, names: list[str]) -> Fisher:
        rows = torch.arange(FISHER_ROWS)
        chosen = torch.randperm(FISHER_ROWS, generator=torch.Generator().manual_seed(0)) % self.samples.rows
        key, steps = stream_key(0, "judged Fisher"), model.schedule.train_timesteps
        timesteps = stratified_timesteps(key, 0, FISHER_ROWS, steps)
        noise = gaussian_noise(key, rows, timesteps, rows, model.latent_shape)
        first = torch.nonzero(self.block.caption_number == 0).flatten()
        condition = {name: tensor[first][chosen] for name, tensor in self.block.condition.items()}
        named = list(condition)

        def loss(denoiser: torch.nn.Module, batch: list[Tensor]) -> Tensor:
            clean, at, drawn, *rest = batch
            return per_sample_loss(
                denoiser, model.schedule, clean, dict(zip(named, rest, strict=True)), at, drawn
            ).sum()

        dataset = TensorDataset(self.block.latents[chosen, 0], timesteps, noise, *condition.values())
        return fit_fisher(kind, model.denoiser, names, dataset, loss, 64, self.context.device)

    def scores(
        self, objective: Objective, layers: str, share: float, model: DiffusionModel
    ) -> Iterator[tuple[Setting, Tensor]]:
        """Yield scores of all samples, (queries, samples) float64, under every damping, in three forms."""
        fisher = self.fisher(model, list(select_layers(model.denoiser, layers)))
        both = self.rotated(model.with_objective(objective), fisher)
        for damping, form, found in scores_of(fisher, both, DAMPINGS):
            yield Setting(objective, layers, share, damping, form), found

    def rotated(self, seen: DiffusionModel, fisher: EkfacFisher) -> dict[str, tuple[Tensor, Tensor]]:
        """Return gradients in the Fisher's eigenbasis of queries and of samples, (n, d_out * d_in) each, by layer."""
        asked = self.of_queries(seen.with_objective(seen.objective.of_query), fisher)
        teacher = self.context.config.teacher.model_copy(update={"objective": seen.objective})
        kept = self.of_samples(seen, fisher, noise_plan(self.context.config.model_copy(update={"teacher": teacher})))
        return {name: (asked[name], kept[name]) for name in fisher.layers}

    def of_queries(self, model: DiffusionModel, fisher: EkfacFisher) -> dict[str, Tensor]:
        """Return the queries' gradients in the Fisher's eigenbasis, (queries, d_out * d_in) by layer."""
        layers = {name: model.denoiser.get_submodule(name) for name in fisher.layers}
        found = defaultdict[str, list[Tensor]](list)
        for query in self.several:
            gradient = query_gradients(
                model, layers, model.encode_images([query.image])[0], model.encode_captions([query.caption]),
                owner=query.owner, seed=0, pairs=PAIRS, groups=1, micro_batch=MicroBatch(PAIRS),
            )  # fmt: skip
            for name, each in gradient.items():
                found[name].append(fisher.layers[name].rotate(each).flatten(1))
        return {name: torch.cat(several).float() for name, several in found.items()}

    def of_samples(self, model: DiffusionModel, fisher: EkfacFisher, plan: NoisePlan) -> dict[str, Tensor]:
        """Return the samples' gradients under a noise plan in the eigenbasis, (samples, d_out * d_in) by layer."""
        layers = {name: model.denoiser.get_submodule(name) for name in fisher.layers}
        found = defaultdict[str, list[Tensor]](list)
        for some in sample_gradients(model, layers, plan, self.block, MicroBatch(64)):
            for name in layers:
                found[name].append(some.rotated(name, fisher.layers[name]))
        return {name: torch.cat(several).float() for name, several in found.items()}

    def introduce(self) -> None:
        """Print the machine, the pool, and what a score can reach on each split."""
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
        print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {packages}")
        print(f"{self.samples.rows} samples, {len(self.kept)} models on random halves, {len(self.again)} of them again")
        twice = reliability(self.losses[: len(self.again)], self.again)
        ceilings = [f"{split} {float(twice[self.of_split[split]].mean()):.3f}" for split in SPLITS]
        print(f"what a score can reach: {', '.join(ceilings)}")

    def lead(self, scores: Tensor, rival: Tensor, split: str) -> Lds:
        """Return how far scores are ahead of others, (queries, samples) each, on the queries of a split."""
        mine = self.of_split[split]
        return difference(self.kept, scores[mine], rival[mine], self.losses[:, mine])

    def cheap(self) -> dict[str, Tensor]:
        """Return what needs no teacher."""
        found = {
            "random": torch.randn(len(self.several), self.samples.rows, generator=torch.Generator().manual_seed(5))
        }
        space = self.context.config.features.space
        for centre in (False, True):
            for name, each in (("captions", text_space(space)), ("features", space)):
                changed = in_space(self.context, space=each, centre=centre)
                for items in (self.samples, self.queries):
                    extract_features.fn(changed, items)
                phi = [
                    F.normalize(load_features(changed, items, self.samples), dim=1)
                    for items in (self.queries, self.samples)
                ]
                found[f"{name}, centred" if centre else name] = phi[0] @ phi[1].T
        return found


def scores_of(
    fisher: EkfacFisher, both: Mapping[str, tuple[Tensor, Tensor]], dampings: Sequence[float]
) -> Iterator[tuple[float, str, Tensor]]:
    """Yield damping, form and scores, (queries, samples) float64, of gradients in the eigenbasis, in three forms."""
    for damping in dampings:
        total, length = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for name, (of_queries, of_samples) in both.items():
            weight = fisher.layers[name].damped(damping).flatten().reciprocal().float()
            total = total + ((of_queries * weight) @ of_samples.T).double()
            length = length + (of_samples.square() * weight).sum(1).double()
        yield damping, "", total
        yield damping, ", negative ones 0", total.clamp_min(0)
        yield damping, ", divided by the sample's length", total / length.sqrt()


def row(world: World, name: str, scores: Tensor) -> str:
    cells = []
    for split in SPLITS:
        mine = world.of_split[split]
        found = linear_datamodelling(world.kept, scores[mine], world.losses[:, mine])
        cells.append(f"{found.mean:+.3f} ± {found.over_queries:.3f} ± {found.over_models:.3f}")
    ranks = twin_ranks(scores[world.of_split[TWIN]], world.twins)
    first = int((ranks <= max(1, world.samples.rows // 100)).sum())
    return f"| {name} | {' | '.join(cells)} | {first} of {len(ranks)}, {int(ranks.max())} |"


def ahead(lead: Lds) -> str:
    """Return a lead with both errors and the interval over models."""
    low, high = lead.interval
    return f"{lead.mean:+.3f} ± {lead.over_queries:.3f} ± {lead.over_models:.3f}, {low:+.3f} to {high:+.3f}"


def mean_lds(world: World, scores: Tensor, split: str) -> float:
    mine = world.of_split[split]
    return float(spearman(predictions(world.kept, scores[mine]), -world.losses[:, mine].T.double()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", nargs="+", default=["cross-attn-kv", "attn", "all"])
    arguments = parser.parse_args()
    world = World(open_context(load_config(arguments.config)))
    world.introduce()
    print(f"\n{HEAD}")
    cheap = world.cheap()
    for name, scores in cheap.items():
        print(row(world, name, scores), flush=True)
    found: dict[Setting, Tensor] = {}
    for share, model in world.models().items():
        for objective in Objective:
            for layers in arguments.layers:
                several = dict(world.scores(objective, layers, share, model))
                best = max(several, key=lambda each: mean_lds(world, several[each], "validation"))
                print(row(world, str(best), several[best]), flush=True)
                found |= several
    for objective in Objective:  # as published, and as the demo has it
        for form in ("", ", negative ones 0"):
            setting = Setting(objective, "cross-attn-kv", 1.0, 0.1, form)
            print(row(world, f"fixed: {setting}", found[setting]), flush=True)
    rivals = {"captions": cheap["captions"]}
    for objective in Objective:
        several = dict(world.scores(objective, "cross-attn-kv", 1.0, world.randomised()))
        name = f"fresh weights: {objective}, cross-attn-kv, damping 0.1"
        rivals[name] = several[Setting(objective, "cross-attn-kv", 1.0, 0.1, "")]
        print(row(world, name, rivals[name]))
    best = max(found, key=lambda each: mean_lds(world, found[each], "validation"))
    print(row(world, f"**chosen on validation: {best}**", found[best]))
    for split, (name, rival) in itertools.product(SPLITS[1:], rivals.items()):
        print(f"\nahead of {name}, {split}: {ahead(world.lead(found[best], rival, split))}")


if __name__ == "__main__":
    main()
