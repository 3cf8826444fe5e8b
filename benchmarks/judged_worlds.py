"""Is it the model? The published teacher against models trained again, in worlds that differ in one thing each.

Each world is the judge's (`fastgda demo --judge`) with another target, another size, or another training. Its model is
trained, queries are generated, and models are trained on random halves, some of them again from another seed. No
setting is chosen here, so all queries that the model generated are judged together, those of the configuration's
captions and those of training captions; training images as queries stand apart.

What is made is kept in the folder, model by model: a run that was stopped goes on, and one with more halves
(`--subsets`) trains only those. Prints Markdown tables.

Run: python benchmarks/judged_worlds.py FOLDER [--worlds NAME ...]
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.judged_teachers import SHARES, World
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.sampling import generate
from fastgda_core.evaluation.lds import Lds, difference, linear_datamodelling, reliability
from fastgda_core.evaluation.ranking_metrics import twin_ranks
from storage_schemas.commit import input_key, write_atomically
from storage_schemas.tables import PSEUDO, TWIN
from tasks.config.files import load_config
from tasks.context import Context, open_context
from tasks.demo import judge_world
from tasks.demo.invented import invented_pictures
from tasks.demo.openmoji import write_shards
from tasks.inputs.queries import make_queries
from tasks.inputs.samples import ingest_samples, samples_table
from tasks.teaching.latents import LatentParts, latents_of
from tasks.teaching.retrainings import RetrainingParts, judged_by

LAYERS, DAMPING = "cross-attn-kv", 0.1
GENERATED, IMAGES = ("validation", "test", TWIN), (PSEUDO,)
DRAWN, AT_ONCE = 96, 16  # training captions that pictures are drawn from, to see whether they are recognisable
DRAWN_NUMBERS = 2**33  # + train_id: the starting noise of such a picture, apart from that of every query
POOL = ("retrain", "subsets", "again", "draws")  # of the section `judge`: no model is trained without what was named
PUBLISHED, TIED, NORM, HALF, QUARTER = "AbU+ as published", "negative ones 0", "output norm", "at 50 %", "at 25 %"


@dataclass(frozen=True)
class Variant:
    """What of a world is not the judge's own: the denoiser's width, its target, fields of `judge.retrain`."""

    width: int = judge_world.WIDTH
    target: str = judge_world.TARGET
    recipe: dict[str, float] = field(default_factory=dict)


VARIANTS = {
    "the judge's world": Variant(),
    "epsilon": Variant(target="epsilon"),
    "v_prediction": Variant(target="v_prediction"),
    "880 steps": Variant(recipe={"steps": 880}),
    "width 64": Variant(width=64),
    "batch 256": Variant(recipe={"batch_size": 256}),
    "110 steps": Variant(recipe={"steps": 110}),
    "440 steps": Variant(recipe={"steps": 440}),
    "width 16": Variant(width=16),
    "not averaged": Variant(recipe={"ema_decay": 0.0}),
    "learning rate 1e-3": Variant(recipe={"learning_rate": 1e-3}),
    "weight decay 1": Variant(recipe={"weight_decay": 1.0}),
    "batch 16": Variant(recipe={"batch_size": 16}),
    "epsilon, 880 steps": Variant(target="epsilon", recipe={"steps": 880}),
    "v_prediction, 880 steps": Variant(target="v_prediction", recipe={"steps": 880}),
}


def lay_out(folder: Path, shards: Path, variant: Variant, base: dict[str, Any]) -> Context:
    """Write a world's configuration and model, which is trained here, and open it.

    Args:
        folder: of the world.
        shards: folder of its samples.
        variant: what is not as in `base`.
        base: configuration of the judge's world, as in its file.
    """
    judge = {name: value for name, value in base["judge"].items() if name in POOL}
    judge["retrain"] = judge["retrain"] | variant.recipe
    teacher = {name: value for name, value in base["teacher"].items() if name != "checkpoints"}
    told = base | {"data": {"shards": str(shards / "*.tar")}, "judge": judge, "teacher": teacher}
    config = folder / "config.yaml"
    write_atomically(config, yaml.safe_dump(told, allow_unicode=True).encode())
    loaded = load_config(config)
    assert loaded.judge is not None
    judge_world.write_model(folder / "model", shards, loaded.judge, width=variant.width, target=variant.target)
    return open_context(loaded)


def train_pool(context: Context) -> None:
    """Make samples, queries, latents and every model of the pool, as far as they are not there."""
    samples = ingest_samples.fn(context).artifact
    queries = make_queries.fn(context, samples).artifact
    latents = latents_of(context, samples)
    assert context.config.judge is not None
    pool = judged_by(context, context.config.judge, latents, queries, "")[RetrainingParts.kind]
    for parts in (LatentParts(context, samples, latents), RetrainingParts(context, samples, latents, queries, pool)):
        for number in parts.missing():
            parts.make(number)


def scores_of(world: World, kept_in: Path) -> dict[str, Tensor]:
    """Return the scores of every sample, (queries, samples), by method; they are kept in a folder.

    They depend on the recipe and on the queries, and not on how many models the pool has.
    """
    path = kept_in / f"scores-{input_key('worlds', world.parts.artifact.key)}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    found = {"captions": world.cheap()["captions"]}
    for share, model in world.models().items():
        for name, scores in _at(share, world, model):
            found[name] = scores
    staging = path.with_suffix(".part")
    torch.save(found, staging)
    staging.rename(path)
    return found


def _at(share: float, world: World, model: Any) -> Iterator[tuple[str, Tensor]]:
    names = {(0.25, ""): QUARTER, (0.5, ""): HALF, (1.0, ""): PUBLISHED, (1.0, ", negative ones 0"): TIED}
    for setting, scores in world.scores(Objective.loss, LAYERS, share, model):
        if setting.damping == DAMPING and (share, setting.form) in names:
            yield names[share, setting.form], scores
    if share == max(SHARES):
        for setting, scores in world.scores(Objective.output_norm, LAYERS, share, model):
            if setting.damping == DAMPING and not setting.form:
                yield NORM, scores


def ranks_by_pixels(drawn: Tensor, every: Tensor, own: Tensor) -> Tensor:
    """Return the rank of each drawn picture's own one among all, (drawn,), 1 = the nearest, by centred cosine.

    Latents are the pixels in another order. What all pictures have in common, white paper, says nothing.

    Args:
        drawn: latents, (drawn, c, h, w).
        every: those of all training pictures, (samples, c, h, w).
        own: (drawn,), the sample that each belongs to.
    """
    mean = every.flatten(1).mean(0)
    unit = [F.normalize(each.flatten(1) - mean, dim=1) for each in (drawn, every)]
    return twin_ranks(unit[0] @ unit[1].T, own)


def own_picture_ranks(world: World) -> Tensor:
    """Draw from some training captions that one sample alone has; return the ranks of these samples' own pictures."""
    context, model = world.context, world.context.model()
    captions = [several[0] for several in samples_table(world.samples.path)["captions"].to_pylist()]
    alone = [row for row, caption in enumerate(captions) if captions.count(caption) == 1]
    chosen = alone[:: -(-len(alone) // DRAWN)]
    asked, drawn = context.config.queries, []
    for start in range(0, len(chosen), AT_ONCE):
        some = chosen[start : start + AT_ONCE]
        drawn.append(
            generate(
                model, [captions[row] for row in some], [DRAWN_NUMBERS + row for row in some],
                seed=asked.seed, steps=asked.steps, guidance_scale=asked.guidance_scale,
            )
        )  # fmt: skip
    return ranks_by_pixels(torch.cat(drawn), world.block.latents[:, 0], torch.tensor(chosen))


@dataclass(frozen=True)
class Judged:
    """A world, its pool and the scores of the methods, by name."""

    name: str
    world: World
    scores: dict[str, Tensor]

    def rows(self, splits: tuple[str, ...]) -> list[int]:
        return [number for split in splits for number in self.world.of_split[split]]

    def lds(self, method: str, splits: tuple[str, ...]) -> Lds:
        mine = self.rows(splits)
        return linear_datamodelling(self.world.kept, self.scores[method][mine], self.world.losses[:, mine])

    def lead(self, method: str, other: str, splits: tuple[str, ...]) -> Lds:
        mine = self.rows(splits)
        pair = [self.scores[each][mine] for each in (method, other)]
        return difference(self.world.kept, *pair, self.world.losses[:, mine])

    def reach(self, splits: tuple[str, ...]) -> str:
        again = self.world.again
        by_query = reliability(self.world.losses[: len(again)], again)[self.rows(splits)]
        return f"{float(by_query.mean()):.2f} ± {float(by_query.std()) / len(by_query) ** 0.5:.2f}"

    def twins_first(self, method: str) -> str:
        ranks = twin_ranks(self.scores[method][self.world.of_split[TWIN]], self.world.twins)
        return f"{int((ranks <= max(1, self.world.samples.rows // 100)).sum())} of {len(ranks)}"

    def what_it_is(self) -> str:
        """Return a row: its weights, its losses, whether its pictures are recognisable, what a score can reach."""
        world, images = self.world, self.world.of_split[PSEUDO]
        weights = sum(parameter.numel() for parameter in world.context.model().denoiser.parameters())
        whole = world.parts.losses(0).mean(0)
        member = world.kept[:, world.twins]  # the twin queries and the training images are of the same samples
        of_images = world.losses[:, images]
        seen, left_out = of_images[member].mean(), of_images[~member].mean()
        ranks = own_picture_ranks(world)
        first = float((ranks <= max(1, world.samples.rows // 100)).float().mean())
        return (
            f"| {self.name} | {weights / 1e6:.2f} M | {float(whole[self.rows(GENERATED)].mean()):.3f} | "
            f"{float(whole[images].mean()):.3f} | {float(left_out / seen):.2f} | "
            f"{first:.0%}, {int(ranks.median())} | {self.reach(GENERATED)} | {self.reach(IMAGES)} |"
        )

    def how_true(self, splits: tuple[str, ...]) -> str:
        methods = ("captions", PUBLISHED, TIED, NORM, HALF, QUARTER)
        cells = [_cell(self.lds(method, splits)) for method in methods]
        cells += [_cell(self.lead(PUBLISHED, "captions", splits)), _cell(self.lead(QUARTER, PUBLISHED, splits))]
        if TWIN in splits:
            cells += [self.twins_first(method) for method in (PUBLISHED, NORM, QUARTER)]
        return f"| {self.name} | {' | '.join(cells)} |"


def _cell(found: Lds) -> str:
    return f"{found.mean:+.2f} ± {found.over_queries:.2f} ± {found.over_models:.2f}"


def judge(name: str, folder: Path, shards: Path, base: dict[str, Any]) -> Judged:
    """Make what a world needs, or find it made, and score its queries."""
    mine = folder / name.replace(" ", "-").replace(",", "").replace("'", "")
    mine.mkdir(parents=True, exist_ok=True)
    context = lay_out(mine, shards, VARIANTS[name], base)
    train_pool(context)
    world = World(context)
    return Judged(name, world, scores_of(world, mine))


def report(found: list[Judged]) -> str:
    """Return the tables of the worlds."""
    first = found[0].world
    lines = [
        f"{first.samples.rows} samples, {len(first.kept)} models on random halves, {len(first.again)} of them again",
        "\n| world | weights | loss of generated queries | of training images | left out : included | "
        "drawn from a training caption: own picture first 1 %, median rank | can be reached, generated | images |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(each.what_it_is() for each in found),
    ]
    for splits, title, twins in ((GENERATED, "generated", 3), (IMAGES, "training images", 0)):
        firsts = [f"twins first: {each}" for each in ("published", NORM, QUARTER)][:twins]
        head = [
            f"LDS, {len(found[0].rows(splits))} {title}: captions", PUBLISHED, TIED, NORM, HALF, QUARTER,
            "published less captions", "25 % less published", *firsts,
        ]  # fmt: skip
        lines += [f"\n| world | {' | '.join(head)} |", f"| --- |{' ---: |' * len(head)}"]
        lines += [each.how_true(splits) for each in found]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where worlds are kept; made where it is not there")
    parser.add_argument("--worlds", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                        help=f"of: {'; '.join(VARIANTS)}")  # fmt: skip
    parser.add_argument("--subsets", type=int, default=24, help="models on random halves (default: %(default)s)")
    parser.add_argument("--again", type=int, default=6, help="of them from another seed (default: %(default)s)")
    arguments = parser.parse_args()
    shards = arguments.folder.resolve() / "shards"
    write_shards(shards, judge_world.choose, invented_pictures())
    base = yaml.safe_load(judge_world.CONFIG.read_text())
    base["judge"] |= {"subsets": arguments.subsets, "again": arguments.again}
    found = []
    for name in arguments.worlds:
        found.append(judge(name, arguments.folder.resolve(), shards, base))
        print(f"{name}: judged", file=sys.stderr, flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {packages}")
    print(report(found))


if __name__ == "__main__":
    main()
