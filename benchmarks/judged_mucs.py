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
from fastgda_core.evaluation.retraining import to_train
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.mucs import Ascent, unlearn, untrained_loss
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import losses_by_row, plan_rows, training_losses
from fastgda_core.teachers.unlearning import moved, query_gradients, unlearning_update
from storage_schemas import tables
from tasks.config.files import load_config
from tasks.context import open_context
from tasks.execution.plan import run_artifacts, run_name

ROWS, MOST_STEPS = 100, 150
STRIDE = 100  # of the timesteps: ten, seven of them among the noisier
TIMESTEPS = torch.arange(STRIDE - 1, 1000, STRIDE)
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

    def scores(self, after: Tensor, before: Tensor) -> Tensor:
        """Return scores, (queries, samples), of losses after, (queries, samples, timesteps), and before."""
        found = (after - before) / (after + before + RATIO_EPSILON) if self.ratio else after - before
        return found[..., TIMESTEPS.ge(NOISIER * self.noisier)].double().mean(-1)


FORMS = [Form(ratio, noisier) for ratio in (True, False) for noisier in (True, False)]


class Ascents:
    """The ascents of a world's queries under some setting, and the losses of all samples after them."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
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
        """Return a query's losses after, (samples, timesteps), steps and seconds of the ascent, seconds of the rest."""
        path = self.folder / f"{hashlib.sha256(f'{setting} {number}'.encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            model, query, started = self.models[setting.place], self.world.several[number], time.monotonic()
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
            between = time.monotonic()
            with moved(layers, found.update):
                losses = self._losses(model)
            seconds = torch.tensor([between - started, time.monotonic() - between])
            save_file({"losses": losses, "seconds": seconds, "steps": torch.tensor(found.steps)}, path)
        return load_file(path)

    def before(self, place: str) -> Tensor:
        """Return the losses before, (samples, timesteps)."""
        path = self.folder / f"before-{place}.safetensors"
        if not path.exists():
            save_file({"losses": self._losses(self.models[place])}, path)
        return load_file(path)["losses"]

    def _losses(self, model: DiffusionModel) -> Tensor:
        plan = CommonNoisePlan(seed=0, timesteps=tuple(TIMESTEPS.tolist()), draws=1)
        rows = plan_rows(model, plan, self.world.block)
        return losses_by_row(model, plan, self.world.block, rows, BATCH).view(self.world.samples.rows, -1).float()

    def scores(self, setting: Setting, numbers: Iterable[int]) -> tuple[dict[Form, Tensor], str]:
        """Return scores of some queries, zero for all others, in every form; and what they took, in words."""
        whole = {form: torch.zeros(len(self.world.several), self.world.samples.rows).double() for form in FORMS}
        chosen, before = list(numbers), self.before(setting.place)
        kept = [self.losses(setting, number) for number in chosen]
        after = torch.stack([each["losses"] for each in kept])
        for form, scores in whole.items():
            scores[chosen] = form.scores(after, before)
        steps, (ascent, rest) = torch.stack([each["steps"] for each in kept]), _mean(kept, "seconds")
        told = f"{int(steps.min())} to {int(steps.max())} steps, {ascent:.1f} s, and {rest:.1f} s of forwards"
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

    def best(self, *, place: str | None = None) -> tuple[Setting, Form]:
        allowed = [each for each in self.found if place in (None, each[0].place)]
        return max(allowed, key=self.found.__getitem__)


def searched(ascents: Ascents) -> Search:
    """Try rates and layers, early weights, and of the best the query's weight and the number of steps."""
    search, rate = Search(ascents), ascents.rate
    print(f"| on validation queries | {' | '.join(map(str, FORMS))} | |\n| --- | ---: | ---: | ---: | ---: | --- |")
    search.try_all(Setting(FINAL, "mlp", times * rate) for times in (1, 3, 10))
    search.try_all([Setting(FINAL, "all", rate), Setting(FINAL, "cross-attn-kv", 10 * rate)])
    search.try_all(Setting("0.25", layers, 10 * rate) for layers in ("cross-attn-kv", "mlp"))
    best = search.best()[0]
    search.try_all([replace(best, forget_weight=1.0), replace(best, steps=1), replace(best, steps=3)])
    return search


def exact_rivals(world: World) -> Iterator[tuple[str, Tensor]]:
    """Yield scores of the exact teachers and of the first-order one, with the published step, at the final weights."""
    model, block = world.context.model(), world.block
    names = list(select_layers(model.denoiser, "cross-attn-kv"))
    layers, plan, samples = select_layers(model.denoiser, "cross-attn-kv"), NoisePlan(seed=0, timesteps=10, draws=1), 0
    base, samples = training_losses(model, plan, block, BATCH), world.samples.rows
    gradients = [
        {
            name: each[0]
            for name, each in query_gradients(
                model, layers, model.encode_images([query.image])[0], model.encode_captions([query.caption]),
                owner=query.owner, seed=0, pairs=128, groups=1, micro_batch=BATCH,
            ).items()
        }
        for query in world.several
    ]  # fmt: skip
    for kind, name in (("diagonal", "abu"), ("ekfac", "abu_plus")):
        fisher, started = world.fisher_of_kind(kind, model, names), time.monotonic()
        updates = [
            unlearning_update(fisher, gradient, alpha=STEP / samples, training_size=samples) for gradient in gradients
        ]
        found = [exact_scores(model, layers, plan, block, base, update, BATCH) for update in updates]
        yield f"{name}, exact ({(time.monotonic() - started) / len(found):.1f} s a query)", torch.stack(found)
    started = time.monotonic()
    together = {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
    found = first_order_scores(model, layers, plan, block, [together], BATCH)
    yield f"abu_plus_first_order ({(time.monotonic() - started) / len(found):.2f} s a query)", found


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
        "best at the final weights": search.best(place=FINAL),
        "best": search.best(),
    }
    for name, (setting, form) in chosen.items():
        several, told = ascents.scores(setting, asked)
        methods[f"MUCS, {name}: {setting}, {form} ({told})"] = several[form]
    cheap = world.cheap()
    methods |= {"random": cheap["random"], **dict(exact_rivals(world))}
    rivals = {"captions": cheap["captions, centred"], "the run's teacher": of_the_run(world)}
    report(world, methods, rivals)


if __name__ == "__main__":
    main()
