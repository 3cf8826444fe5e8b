"""Sketches and the query tower against the teacher that they stand for: quality, bytes, seconds; a Markdown table.

Takes the data, model, Fisher and published scores of a finished run of a first-order teacher whose candidates are all
samples. Labels are the run's own scores. All else is drawn again for every seed, with noise of its own: the samples'
gradients that are sketched, the test queries' gradients, those that the tower learns from. Coordinates and directions
are chosen by the Fisher, the samples and the training queries, ridge and weight of the cosine on validation queries;
figures are means over seeds, with errors over test queries.

Run: python benchmarks/sketches.py CONFIG
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from stages import make_latents
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.curvature.fisher import EkfacFisher, load_fisher
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.evaluation.ranking_metrics import average_precision, spearman, top_mask
from fastgda_core.features import cosines
from fastgda_core.ranking.query_tower import QueryTower, TowerMoments
from fastgda_core.sketches.eigen import EigenSketch, step_moments
from fastgda_core.sketches.factored import CaptionInputs, FactoredSketch
from fastgda_core.sketches.int8 import Int8Vectors, bytes_of
from fastgda_core.sketches.principal import PrincipalSketch
from fastgda_core.teachers.sample_gradients import SampleGradients, sample_gradients
from storage_schemas.files import local_copy
from storage_schemas.snapshots.published import read_published
from tasks.artifact import Artifact
from tasks.config.files import load_config
from tasks.context import Context, open_context
from tasks.distilling.ranks import candidate_scores
from tasks.inputs.features import load_features
from tasks.inputs.queries import Query, load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tasks.teaching.curvature import make_curvature
from tasks.teaching.latents import load_block
from tasks.teaching.noise import noise_plan
from tasks.teaching.updates import gradient_of, update_of

DECOUPLED = (1024, 16384)
EIGEN, PRINCIPAL = (2048, 8192, 16384), (256, 512, 768, 1024)
COORDINATES = 131_072
FAST = 768  # numbers that the tower answers with
CUTOFF = 100
TIMESTEPS = 4  # of a pseudo-query's gradient
RIDGES, COSINES = (1.0, 10.0, 100.0), (0.0, 0.25, 0.5)
FIRST = (200, 400, 1000, 2000)  # samples that the fast tier hands to the second stage
BLOCK = 256


class Label(NamedTuple):
    """How a row stands in the plot: its text, and where that is seen from the dot."""

    text: str
    color: str
    place: tuple[int, int] = (10, 0)
    side: str = "left"


FLOOR = 0.002  # seconds, for what takes none
LABELS = {
    "untuned features, centred": Label("untuned features, 6.7 KB", "0.55"),
    "eigen sketch, 2,048 numbers": Label("eigen sketch, 2.2 KB", "tab:orange", (12, 0)),
    "eigen sketch, 16,384 numbers": Label("eigen sketch, 17 KB", "tab:orange", (18, 0)),
    "principal sketch, 256 numbers": Label("principal sketch, 0.3 KB", "tab:blue", (-6, -15), "right"),
    "principal sketch, 1,024 numbers": Label("principal sketch, 1.1 KB", "tab:blue", (-12, -9), "right"),
    "query tower and centred features": Label("query tower and features, 2.6 KB", "tab:green", (0, 16), "center"),
    "two stages, the tower's first 400": Label("two stages, first 400, 3.7 KB", "tab:red", (12, -14)),
}


class Bench:
    """A finished run, and what is drawn again of it."""

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config
        self.samples = ingest_samples.fn(context).artifact
        self.queries = make_queries.fn(context, self.samples).artifact
        self.latents = make_latents(context, self.samples)
        fisher = load_fisher(local_copy(make_curvature(context, self.latents).path), self.config.teacher.damping)
        assert isinstance(fisher, EkfacFisher)
        self.fisher = fisher
        self.model = context.teacher_model()
        self.layers = context.layers(self.model)
        several = load_queries(self.queries)
        self.train, self.validation, self.test = (
            [query for query in several if query.split == split] for split in ("train", "validation", "test")
        )
        self.asked = [*self.validation, *self.test]
        ranks = Artifact("ranks", read_published(context.workspace).snapshot, context.workspace.root, 0)
        self.labels = candidate_scores(context.workspace, ranks, [query.query_id for query in self.asked]).scores
        assert self.labels.shape[1] == self.samples.rows, "the candidates are not all samples"
        row = {query.query_id: number for number, query in enumerate(several)}
        queries = load_features(context, self.queries, self.samples)[[row[query.query_id] for query in self.asked]]
        self.phi = F.normalize(load_features(context, self.samples, self.samples), dim=1)
        self.phi_asked = F.normalize(queries, dim=1)
        self.untuned = cosines(self.phi_asked, self.phi)
        self.eigen = self._eigen()

    def _eigen(self) -> EigenSketch:
        seen = {name: factors.eigenvalues.flatten().double() for name, factors in self.fisher.layers.items()}
        steps = step_moments(self.fisher, (self.updates([query], self.config.teacher.seed) for query in self.train))
        return EigenSketch.of_most_energy(self.fisher, seen, steps, COORDINATES)

    def gradients(self, plan: NoisePlan) -> Iterator[tuple[slice, SampleGradients]]:
        micro_batch = self.context.micro_batch("gradients")
        first = 0
        for start in range(0, self.samples.rows, BLOCK):
            block = load_block(self.context, self.latents, list(range(start, min(start + BLOCK, self.samples.rows))))
            for some in sample_gradients(self.model, self.layers, plan, block, micro_batch):
                last = first + some.count // some.flips
                yield slice(first, last), some
                first = last

    def updates(self, queries: list[Query], seed: int) -> dict[str, Tensor]:
        """Return the unlearning steps of some queries by layer, (queries, d_out, d_in)."""
        gradients = [gradient_of(self.context, query, seed) for query in queries]
        updates = [update_of(self.context, gradient, self.fisher, self.samples.rows) for gradient in gradients]
        return {name: torch.stack([update[name] for update in updates]) for name in updates[0]}

    def precision(self, scores: Tensor) -> Tensor:
        """Return AP(100) of each query, validation first."""
        return average_precision(scores.double(), top_mask(self.labels.double(), CUTOFF))


class DecoupledProjection:
    """Random directions of a layer's inputs beside those of its output gradients, as LoGra and its like keep them.

    The gradient of a layer is G, (d_out, d_in), whitened in the eigenbasis of the Fisher; kept is P_E G P_A, with
    Gaussian P_E and P_A, of as many numbers in every layer (Choe et al. 2024, arXiv 2405.13954; arXiv 2602.10449).
    """

    def __init__(self, bench: Bench, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.fisher, self.by_layer = bench.fisher, {}
        side = round((size / len(bench.layers)) ** 0.5)
        self.size = side**2 * len(bench.layers)
        for name, factors in bench.fisher.layers.items():
            scale = factors.damped(bench.fisher.damping).rsqrt().float()
            left, right = (torch.randn(side, each, generator=generator) / side**0.5 for each in scale.shape)
            self.by_layer[name] = scale, left, right

    def of_samples(self, gradients: SampleGradients) -> Tensor:
        return self._project({name: gradients.rotated(name, self.fisher.layers[name]) for name in self.by_layer})

    def of_queries(self, gradients: list[dict[str, Tensor]]) -> Tensor:
        stacked = {name: torch.stack([gradient[name] for gradient in gradients]) for name in self.by_layer}
        return self._project({name: self.fisher.layers[name].rotate(stacked[name]) for name in self.by_layer})

    def _project(self, rotated: dict[str, Tensor]) -> Tensor:
        found = []
        for name, (scale, left, right) in self.by_layer.items():
            whitened = rotated[name].float().view(-1, *scale.shape) * scale
            found.append((left @ whitened @ right.T).flatten(1))
        return torch.cat(found, dim=1)


class Table:
    """Rows by name, averaged over seeds."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.rows = bench, defaultdict[str, list[tuple[Tensor, Tensor, float, float]]](list)
        self.recalls = defaultdict[int, list[Tensor]](list)

    def add(self, name: str, scores: Tensor, bytes_each: float, seconds: float) -> None:
        test = slice(len(self.bench.validation), None)
        rho = spearman(self.bench.labels[test].double(), scores[test].double())
        self.rows[name].append((self.bench.precision(scores)[test], rho, bytes_each, seconds))

    def plot(self, path: Path, ceiling: float) -> None:
        """Draw quality against the seconds of an answer; a dot is as large as what is stored of a sample."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.5, 4.6), layout="constrained")
        axes = figure.subplots()
        for name, seeds in self.rows.items():
            if (label := LABELS.get(name)) is None:
                continue
            precisions, _, sizes, seconds = zip(*seeds, strict=True)
            quality, took, size = torch.stack(precisions).mean(), sum(seconds) / len(seconds), sum(sizes) / len(sizes)
            # Features are there already when the first answer begins.
            axes.scatter(max(took, FLOOR), quality, s=size**0.5 * 3, color=label.color, alpha=0.75)
            beside = {"xytext": label.place, "textcoords": "offset points"}
            axes.annotate(label.text, (max(took, FLOOR), quality), **beside, ha=label.side, va="center", fontsize=9)
        axes.axhline(ceiling, color="0.4", linestyle="--", linewidth=1)
        axes.text(FLOOR * 0.75, ceiling + 0.008, "two whole teachers", color="0.35", fontsize=9)
        axes.set_xscale("log")
        axes.set(xlabel="seconds of one answer, 2 cores (log)", ylabel=f"mAP({CUTOFF}) against the teacher")
        axes.set(xlim=(FLOOR * 0.7, 1.5), ylim=(0.5, 1.0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=130)

    def show(self) -> None:
        print("\n| | bytes a sample | s a query | mAP(100) | Spearman |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, seeds in self.rows.items():
            precisions, rhos, sizes, seconds = zip(*seeds, strict=True)
            mean, rho = torch.stack(precisions).mean(0), torch.stack(rhos).mean()
            error = mean.std() / len(mean) ** 0.5
            size, took = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
            print(f"| {name} | {size:,.0f} | {took:.3f} | {mean.mean():.3f} ± {error:.3f} | {rho:.3f} |")
        print(f"\n| the teacher's first {CUTOFF} among the tower's first | recall | lowest of a query |")
        print("| ---: | ---: | ---: |")
        for count, seeds in self.recalls.items():
            mean = torch.stack(seeds).mean(0)
            print(f"| {count:,} | {mean.mean():.3f} ± {mean.std() / len(mean) ** 0.5:.3f} | {mean.min():.2f} |")


def timed(compute: Callable[[], Tensor], queries: int) -> tuple[Tensor, float]:
    """Return what is computed, and its seconds a query."""
    started = time.monotonic()
    found = compute()
    return found, (time.monotonic() - started) / queries


@torch.no_grad()
def draw(bench: Bench, table: Table, seed: int) -> None:
    """Draw everything again and measure it."""
    sketch_seed, query_seed, tower_seed = (100 * (seed + 1) + number for number in range(3))
    asked, context = bench.asked, bench.context
    started = time.monotonic()
    gradients = [gradient_of(context, query, query_seed) for query in asked]
    of_gradient = (time.monotonic() - started) / len(asked)
    updates = [update_of(context, gradient, bench.fisher, bench.samples.rows) for gradient in gradients]
    stacked = {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
    projections = [DecoupledProjection(bench, size, seed) for size in DECOUPLED]
    kept, projected, exact, rounded, filled, contracting = [], [], [], [], 0, 0.0
    for _, some in bench.gradients(noise_plan(bench.config, sketch_seed)):
        kept.append(bench.eigen.of_samples(some)[:, 0])
        projected.append([projection.of_samples(some) for projection in projections])
        factored = FactoredSketch.of_samples(some)
        exact.append(factored.scores(some.inputs, [stacked]))
        packed = Int8Vectors.of(factored.deltas.flatten(0, 1))
        filled += int((packed.scales.amax(1) > 0).sum()) * bytes_of(packed.values.shape[1])
        short = replace(factored, deltas=packed.dense().view_as(factored.deltas))
        scores, seconds = timed(lambda made=short, inputs=some.inputs: made.scores(inputs, [stacked]), len(asked))
        rounded.append(scores)
        contracting += seconds
    sketches = torch.cat(kept)
    eigen = torch.stack([bench.eigen.of_query(gradient) for gradient in gradients])
    principal = PrincipalSketch.of_samples_like(bench.eigen, sketches, max(PRINCIPAL))
    turned, turned_asked = sketches @ principal.directions, eigen @ principal.directions

    table.add("untuned features, centred", bench.untuned, 4 * bench.phi.shape[1], 0)
    for size in EIGEN:
        packed = Int8Vectors.of(sketches[:, :size])
        scores, seconds = timed(lambda few=packed, size=size: eigen[:, :size] @ few.dense().T, len(asked))
        table.add(f"eigen sketch, {size:,} numbers", scores, bytes_of(size), of_gradient + seconds)
    for number, projection in enumerate(projections):
        packed = Int8Vectors.of(torch.cat([block[number] for block in projected]))
        scores, seconds = timed(lambda of=projection, few=packed: of.of_queries(gradients) @ few.dense().T, len(asked))
        name = f"decoupled random projection, {projection.size:,} numbers"
        table.add(name, scores, bytes_of(projection.size), of_gradient + seconds)
    for size in PRINCIPAL:
        packed = Int8Vectors.of(turned[:, :size])
        scores, seconds = timed(lambda few=packed, size=size: turned_asked[:, :size] @ few.dense().T, len(asked))
        table.add(f"principal sketch, {size:,} numbers", scores, bytes_of(size), of_gradient + seconds)
    table.add("factored sketch", torch.cat(rounded, 1), filled / bench.samples.rows, of_gradient + contracting)
    weights = sum(layer.weight.numel() for layer in bench.layers.values())
    table.add("the whole gradient", torch.cat(exact, dim=1), 4 * weights, of_gradient + contracting)
    fast, seconds = answer_by_tower(bench, table, principal, Int8Vectors.of(turned[:, :FAST]).dense(), tower_seed)
    whole = turned_asked @ Int8Vectors.of(turned).dense().T
    relevant = top_mask(bench.labels.double(), CUTOFF)
    test = slice(len(bench.validation), None)
    for count in FIRST:
        first = top_mask(fast.double(), count)
        table.recalls[count].append(((first & relevant).sum(1) / relevant.sum(1))[test])
        size = bytes_of(turned.shape[1]) + bytes_of(FAST) + bytes_of(bench.phi.shape[1])
        scores = whole.masked_fill(~first, -torch.inf)
        table.add(f"two stages, the tower's first {count:,}", scores, size, seconds + of_gradient)


def answer_by_tower(
    bench: Bench, table: Table, principal: PrincipalSketch, items: Tensor, seed: int
) -> tuple[Tensor, float]:
    """Learn the query tower from samples as queries, choose its ridge on validation queries, and measure it.

    Returns its scores with the features' beside them, and the seconds of a query that comes alone.
    """
    moments = TowerMoments()
    for mine, some in bench.gradients(NoisePlan(seed=seed, timesteps=TIMESTEPS, draws=1, first_timestep=125)):
        moments.add(some, bench.phi[mine])
    validation = slice(0, len(bench.validation))

    def chosen(found: list[Tensor]) -> Tensor:
        return max(found, key=lambda scores: float(bench.precision(scores)[validation].mean()))

    answers = []
    for ridge in RIDGES:
        tower = moments.tower(ridge, principal, FAST)
        inputs = inputs_of(bench, tower)

        def asked_alone(tower: QueryTower = tower, inputs: CaptionInputs = inputs) -> Tensor:
            each = [tower_sketch(bench, tower, inputs, number) for number in range(len(bench.asked))]
            return torch.cat(each) @ items.T

        scores, seconds = timed(asked_alone, len(bench.asked))
        answers.append(scores)
    best = chosen(answers)
    table.add(f"query tower, {FAST} numbers", best, bytes_of(FAST), seconds)
    mixed = chosen([standard(best) + weight * standard(bench.untuned) for weight in COSINES])
    width = bench.phi.shape[1]
    table.add("query tower and centred features", mixed, bytes_of(FAST) + bytes_of(width), seconds)
    return mixed, seconds


def inputs_of(bench: Bench, tower: QueryTower) -> CaptionInputs:
    first = {name: bench.layers[name] for name in tower.layers}
    return CaptionInputs(bench.model, first, bench.context.micro_batch("gradients"), bench.asked[0].caption)


def tower_sketch(bench: Bench, tower: QueryTower, inputs: CaptionInputs, number: int) -> Tensor:
    """Return the sketch of one query by its caption and features alone, (1, FAST)."""
    condition = bench.model.encode_captions([bench.asked[number].caption])
    return tower.sketches(inputs.of(condition), bench.phi_asked[number : number + 1])


def standard(scores: Tensor) -> Tensor:
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="where to draw quality against seconds")
    parser.add_argument("--ceiling", type=float, default=0.968, help="mAP of two whole teachers, for the plot")
    arguments = parser.parse_args()
    bench = Bench(open_context(load_config(arguments.config)))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {bench.context.device}"
    print(f"{machine}, Python {platform.python_version()}, {packages}")
    print(f"{bench.samples.rows:,} samples, {len(bench.test)} test queries, {arguments.seeds} seeds")
    print(f"energy kept by {COORDINATES:,} coordinates: {bench.eigen.energy_kept:.3f}")
    table = Table(bench)
    for seed in range(arguments.seeds):
        draw(bench, table, seed)
    table.show()
    if arguments.plot:
        table.plot(arguments.plot, arguments.ceiling)


if __name__ == "__main__":
    main()
