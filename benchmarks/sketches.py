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
from fastgda_core.sketches.factored import FactoredSketch, caption_inputs
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

EIGEN, PRINCIPAL = (2048, 8192, 16384), (256, 512, 768, 1024)
COORDINATES = 131_072
FAST = 768  # numbers that the tower answers with
CUTOFF = 100
TIMESTEPS = 4  # of a pseudo-query's gradient
RIDGES, COSINES = (1.0, 10.0, 100.0), (0.0, 0.25, 0.5)
BLOCK = 256


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


class Table:
    """Rows by name, averaged over seeds."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.rows = bench, defaultdict[str, list[tuple[Tensor, Tensor, float, float]]](list)

    def add(self, name: str, scores: Tensor, bytes_each: float, seconds: float) -> None:
        test = slice(len(self.bench.validation), None)
        rho = spearman(self.bench.labels[test].double(), scores[test].double())
        self.rows[name].append((self.bench.precision(scores)[test], rho, bytes_each, seconds))

    def show(self) -> None:
        print("\n| | bytes a sample | s a query | mAP(100) | Spearman |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, seeds in self.rows.items():
            precisions, rhos, sizes, seconds = zip(*seeds, strict=True)
            mean, rho = torch.stack(precisions).mean(0), torch.stack(rhos).mean()
            error = mean.std() / len(mean) ** 0.5
            size, took = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
            print(f"| {name} | {size:,.0f} | {took:.3f} | {mean.mean():.3f} ± {error:.3f} | {rho:.3f} |")


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
    kept, exact, rounded, filled, contracting = [], [], [], 0, 0.0
    for _, some in bench.gradients(noise_plan(bench.config, sketch_seed)):
        kept.append(bench.eigen.of_samples(some)[:, 0])
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
    for size in PRINCIPAL:
        packed = Int8Vectors.of(turned[:, :size])
        scores, seconds = timed(lambda few=packed, size=size: turned_asked[:, :size] @ few.dense().T, len(asked))
        table.add(f"principal sketch, {size:,} numbers", scores, bytes_of(size), of_gradient + seconds)
    table.add("factored sketch", torch.cat(rounded, 1), filled / bench.samples.rows, of_gradient + contracting)
    weights = sum(layer.weight.numel() for layer in bench.layers.values())
    table.add("the whole gradient", torch.cat(exact, dim=1), 4 * weights, of_gradient + contracting)
    answer_by_tower(bench, table, principal, Int8Vectors.of(turned[:, :FAST]).dense(), tower_seed)


def answer_by_tower(bench: Bench, table: Table, principal: PrincipalSketch, items: Tensor, seed: int) -> None:
    """Learn the query tower from samples as queries, choose its ridge on validation queries, and measure it."""
    moments = TowerMoments()
    for mine, some in bench.gradients(NoisePlan(seed=seed, timesteps=TIMESTEPS, draws=1, first_timestep=125)):
        moments.add(some, bench.phi[mine])
    validation = slice(0, len(bench.validation))

    def chosen(found: list[Tensor]) -> Tensor:
        return max(found, key=lambda scores: float(bench.precision(scores)[validation].mean()))

    answers = []
    for tower in map(moments.tower, RIDGES):
        scores, seconds = timed(lambda tower=tower: tower_sketches(bench, tower, principal) @ items.T, len(bench.asked))
        answers.append(scores)
    best = chosen(answers)
    table.add(f"query tower, {FAST} numbers", best, bytes_of(FAST), seconds)
    mixed = chosen([standard(best) + weight * standard(bench.untuned) for weight in COSINES])
    width = bench.phi.shape[1]
    table.add("query tower and centred features", mixed, bytes_of(FAST) + bytes_of(width), seconds)


def tower_sketches(bench: Bench, tower: QueryTower, principal: PrincipalSketch) -> Tensor:
    """Return the sketches of the queries by their captions and features alone, (queries, FAST)."""
    condition = bench.model.encode_captions([query.caption for query in bench.asked])
    first = {name: bench.layers[name] for name in set(tower.seen_by.values())}
    inputs = caption_inputs(bench.model, first, condition, bench.context.micro_batch("gradients"))
    gradients = tower.gradients(inputs, bench.phi_asked)
    return principal.of_query(gradients)[:, :FAST]


def standard(scores: Tensor) -> Tensor:
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
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


if __name__ == "__main__":
    main()
