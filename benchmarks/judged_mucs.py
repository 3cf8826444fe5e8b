"""MUCS against models that were trained again: its bounded ascent, its ratio, and AbU's single step; Markdown tables.

Takes a finished run with a judge and checkpoints, as `fastgda demo --judge` makes it. Ascents are tried on the
validation queries, a few settings at a time: learning rate, whose weights move, where on its way of training the model
is, weight of the query's loss, and steps. The same forwards give the ratio and the plain rise of the loss, at all
timesteps and at the noisier 70 %. What is best there, and what is published, is scored for all queries, beside the
exact teachers with the published step. Losses are kept in FOLDER, so that a run that was stopped goes on.

Run: python -m benchmarks.judged_mucs CONFIG FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.judged_teachers import HEAD, SPLITS, World, ahead, mean_lds, row
from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.model import DiffusionModel, at_checkpoint
from fastgda_core.diffusion.noise import CommonNoisePlan, NoisePlan
from fastgda_core.diffusion.objective import RATIO_EPSILON
from fastgda_core.evaluation.lds import linear_datamodelling
from fastgda_core.evaluation.retraining import to_train
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.mucs import Ascent, unlearn, untrained_loss
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import losses_by_row, plan_rows, training_losses
from fastgda_core.teachers.unlearning import moved, query_gradient, unlearning_update
from storage_schemas import tables
from tasks.config.files import load_config
from tasks.context import open_context
from tasks.execution.plan import run_artifacts, run_name

ROWS, MOST_STEPS = 100, 150
TIMESTEPS = tuple(range(99, 1000, 100))  # seven of the ten are among the noisier
PUBLISHED = tuple(range(306, 1000, 7))  # the teacher's own list of 100
NOISIER = 300  # of 1,000: the first of the noisier 70 %
FINAL = "final"
STEP = 0.01  # alpha = 0.01 / N, the published step of MSCOCO
BATCH = MicroBatch(100)


@dataclass(frozen=True)
class Setting:
    """place: a share of the training; steps: at most, `MOST_STEPS` where the bound ends it."""

    place: str
    layers: str
    learning_rate: float
    forget_weight: float = 0.2
    steps: int = MOST_STEPS

    def __str__(self) -> str:
        where = "final weights" if self.place == FINAL else f"{float(self.place):.1%} of the steps"
        until = "to the bound" if self.steps == MOST_STEPS else f"at most {self.steps} steps"
        return f"{where}, {self.layers}, rate {self.learning_rate:g}, weight {self.forget_weight:g}, {until}"


@dataclass(frozen=True)
class Form:
    """How losses after and before become scores."""

    ratio: bool
    noisier: bool

    def __str__(self) -> str:
        return f"{'ratio' if self.ratio else 'rise'} at {'the noisier 70 %' if self.noisier else 'all timesteps'}"

    def scores(self, after: Tensor, before: Tensor, timesteps: Tensor) -> Tensor:
        """Return scores, (queries, samples), of losses after, (queries, samples, timesteps), and before."""
        found = (after - before) / (after + before + RATIO_EPSILON) if self.ratio else after - before
        return found[..., timesteps.ge(NOISIER * self.noisier)].double().mean(-1)


FORMS = [Form(ratio, noisier) for ratio in (True, False) for noisier in (True, False)]


class Ascents:
    """The ascents of a world's queries under some setting, and the losses of all samples after them."""

    def __init__(self, world: World, folder: Path, timesteps: tuple[int, ...] = TIMESTEPS) -> None:
        self.world, self.folder, self.timesteps = world, folder, timesteps
        folder.mkdir(parents=True, exist_ok=True)
        model = world.context.model()
        config = world.context.config
        self.rate = config.judge.retrain.learning_rate / 10
        checkpoints = config.model.folder / "checkpoints"
        self.models = {each.name: at_checkpoint(model, each, "unet") for each in sorted(checkpoints.iterdir())}
        self.models[FINAL] = model
        untrained = to_train(model, seed=0, continued=False)
        self.null_loss = untrained_loss(model, untrained, world.block, seed=0, micro_batch=BATCH)

    def losses(self, setting: Setting, number: int) -> dict[str, Tensor]:
        """Return the losses after a query's ascent, (samples, timesteps), its steps, CPU seconds of it and the rest."""
        path = self.folder / f"{hashlib.sha256(f'{setting} {number}'.encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            model, query, started = self.models[setting.place], self.world.several[number], time.process_time()
            layers = select_layers(model.denoiser, setting.layers)
            ascent = Ascent(
                learning_rate=setting.learning_rate,
                forget_weight=setting.forget_weight,
                null_loss=self.null_loss,
                rows=ROWS,
                most_steps=setting.steps,
                seed=0,
            )
            latent, condition = model.encode_images([query.image])[0], model.encode_captions([query.caption])
            block, owner = self.world.block, query.owner
            found = unlearn(model, layers, block, latent, condition, ascent, owner=owner, micro_batch=BATCH)
            between = time.process_time()
            with moved(layers, found.update):
                losses = self._losses(model)
            seconds = torch.tensor([between - started, time.process_time() - between])
            save_file({"losses": losses, "seconds": seconds, "steps": torch.tensor(found.steps)}, path)
        return load_file(path)

    def before(self, place: str) -> Tensor:
        """Return the losses before, (samples, timesteps)."""
        path = self.folder / f"before-{place}.safetensors"
        if not path.exists():
            save_file({"losses": self._losses(self.models[place])}, path)
        return load_file(path)["losses"]

    def _losses(self, model: DiffusionModel) -> Tensor:
        plan = CommonNoisePlan(seed=0, timesteps=self.timesteps, draws=1)
        rows = plan_rows(model, plan, self.world.block)
        return losses_by_row(model, plan, self.world.block, rows, BATCH).view(self.world.samples.rows, -1).float()

    def scores(self, setting: Setting, numbers: Iterable[int]) -> tuple[dict[Form, Tensor], str]:
        """Return scores of some queries, zero for all others, in every form; and what they took, in words."""
        whole = {form: torch.zeros(len(self.world.several), self.world.samples.rows).double() for form in FORMS}
        chosen, before = list(numbers), self.before(setting.place)
        kept = [self.losses(setting, number) for number in chosen]
        after = torch.stack([each["losses"] for each in kept])
        for form, scores in whole.items():
            scores[chosen] = form.scores(after, before, torch.tensor(self.timesteps))
        steps, (ascent, rest) = torch.stack([each["steps"] for each in kept]), _mean(kept, "seconds")
        told = f"{int(steps.min())} to {int(steps.max())} steps, {ascent:.1f} CPU s, and {rest:.1f} of forwards"
        return whole, told


def _mean(kept: list[dict[str, Tensor]], name: str) -> list[float]:
    return torch.stack([each[name] for each in kept]).mean(0).tolist()


class Search:
    """The best setting and form on the validation queries so far."""

    def __init__(self, ascents: Ascents) -> None:
        self.ascents, self.world = ascents, ascents.world
        self.found: dict[tuple[Setting, Form], float] = {}

    def try_all(self, settings: Iterable[Setting]) -> None:
        for setting in dict.fromkeys(settings):
            mine = self.world.of_split["validation"]
            several, told = self.ascents.scores(setting, mine)
            cells = []
            for form, scores in several.items():
                self.found[setting, form] = mean_lds(self.world, scores, "validation")
                cells.append(f"{self.found[setting, form]:+.3f}")
            print(f"| {setting} | {' | '.join(cells)} | {told} |", flush=True)

    def best(self) -> tuple[Setting, Form]:
        return max(self.found, key=self.found.__getitem__)


def searched(ascents: Ascents) -> Search:
    """Try rates and layers, early weights, and of the best the query's weight and the number of steps."""
    search, rate = Search(ascents), ascents.rate
    print(f"| on validation queries | {' | '.join(map(str, FORMS))} | |\n| --- | ---: | ---: | ---: | ---: | --- |")
    search.try_all(Setting(FINAL, "mlp", times * rate) for times in (1, 3, 10))
    search.try_all([Setting(FINAL, "all", rate), Setting(FINAL, "cross-attn-kv", 10 * rate)])
    search.try_all(Setting("0.25", layers, 10 * rate) for layers in ("cross-attn-kv", "mlp"))
    best = search.best()[0]
    search.try_all(replace(best, forget_weight=weight) for weight in (0.05, 1.0))
    search.try_all(replace(best, steps=steps) for steps in (1, 3))
    return search


def exact_rivals(world: World, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield scores of the exact teachers and of the first-order one, with the published step, at the final weights."""
    model, block, samples = world.context.model(), world.block, world.samples.rows
    layers, plan = select_layers(model.denoiser, "cross-attn-kv"), NoisePlan(seed=0, timesteps=10, draws=1)
    base = training_losses(model, plan, block, BATCH)
    for kind, name in (("diagonal", "abu"), ("ekfac", "abu_plus")):
        fisher = world.fisher_of_kind(kind, model, list(layers))
        found, seconds, steps = [], 0.0, []
        for number, query in enumerate(world.several):
            latent, condition = model.encode_images([query.image])[0], model.encode_captions([query.caption])
            gradient = query_gradient(
                model, layers, latent, condition, owner=query.owner, seed=0, pairs=128, micro_batch=BATCH
            )
            steps.append(unlearning_update(fisher, gradient, alpha=STEP / samples, training_size=samples))
            path = folder / f"{name}-{number}.safetensors"
            if not path.exists():
                started = time.process_time()
                scores = exact_scores(model, layers, plan, block, base, steps[-1], BATCH)
                save_file({"scores": scores, "seconds": torch.tensor(time.process_time() - started)}, path)
            kept = load_file(path)
            found.append(kept["scores"])
            seconds += float(kept["seconds"]) / len(world.several)
        yield f"{name}, exact ({seconds:.1f} CPU s a query)", torch.stack(found)
    together = {name: torch.stack([step[name] for step in steps]) for name in layers}
    yield "abu_plus_first_order", first_order_scores(model, layers, plan, block, [together], BATCH)


def of_the_run(world: World) -> Tensor:
    """Return the scores of the run's own teacher, (queries, samples): in the judge's world the sum of checkpoints."""
    context = world.context
    run = run_name(context, run_artifacts(context, world.samples, world.queries))
    kept = tables.read_parts(context.workspace.scores(run), tables.SCORES)
    places = {query.query_id: number for number, query in enumerate(world.several)}
    query = torch.tensor([places[name] for name in kept["query_id"].to_pylist()])
    found = torch.zeros(len(world.several), world.samples.rows, dtype=torch.float64)
    found[query, torch.tensor(kept["train_id"].to_pylist())] = torch.tensor(kept["score"].to_pylist()).double()
    return found


def report(world: World, methods: Mapping[str, Tensor], rivals: Mapping[str, Tensor]) -> None:
    """Print the methods' rows, and how far each is ahead of each rival."""
    print(f"\n{HEAD}")
    for name, scores in (methods | rivals).items():
        print(row(world, name, scores), flush=True)
    print(f"\n| | {' | '.join(f'ahead of {name}, {split}' for name in rivals for split in SPLITS[1:])} |")
    for name, scores in methods.items():
        leads = [ahead(world.lead(scores, rival, split)) for rival in rivals.values() for split in SPLITS[1:]]
        print(f"| {name} | {' | '.join(leads)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    world = World(open_context(load_config(arguments.config)))
    world.introduce()
    ascents = Ascents(world, arguments.folder)
    print(f"an untrained model's loss: {ascents.null_loss:.4f}\n")
    search = searched(ascents)
    asked = [number for split in SPLITS for number in world.of_split[split]]
    published = Form(ratio=True, noisier=True)
    methods = {}
    chosen = {
        "as published": (Setting(FINAL, "mlp", ascents.rate), published),
        "chosen": search.best(),
    }
    for name, (setting, form) in chosen.items():
        several, told = ascents.scores(setting, asked)
        methods[f"MUCS, {name}: {setting}, {form} ({told})"] = several[form]
    cheap, exact = world.cheap(), dict(exact_rivals(world, arguments.folder))
    published_step = {name: scores for name, scores in exact.items() if name.startswith("abu_plus, exact")}
    methods |= {"random": cheap["random"], **{name: exact[name] for name in exact if name not in published_step}}
    rivals = {"captions": cheap["captions, centred"], "the run's teacher": of_the_run(world), **published_step}
    report(world, methods, rivals)
    often, name = Ascents(world, arguments.folder / "published", PUBLISHED), "as published"
    several, told = often.scores(chosen[name][0], world.of_split["test"])
    scores = several[published][world.of_split["test"]]
    found = linear_datamodelling(world.kept, scores, world.losses[:, world.of_split["test"]])
    print(f"\n{name}, with {len(PUBLISHED)} timesteps, test queries ({told}): ", end="")
    print(f"{found.mean:+.3f} ± {found.over_queries:.3f} ± {found.over_models:.3f}")


if __name__ == "__main__":
    main()
