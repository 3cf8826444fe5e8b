"""Sketches against the teacher that they stand for: quality, bytes and seconds; prints a Markdown table.

Takes the data, model, Fisher and published scores of a finished run of a first-order teacher whose candidates are all
samples. Labels are the run's own scores. Sketches and the queries' gradients are drawn again, with noise of their own;
coordinates are chosen on training queries and some samples, and figures are those of test queries.

Run: python benchmarks/sketches.py CONFIG
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from stages import make_latents
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher, load_fisher
from fastgda_core.evaluation.ranking_metrics import average_precision, spearman, top_mask
from fastgda_core.features import cosines
from fastgda_core.sketches.eigen import EigenSketch, sample_moments, step_moments
from fastgda_core.sketches.factored import FactoredSketch
from fastgda_core.sketches.int8 import Int8Vectors, bytes_of
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

SIZES = (2048, 4096, 8192, 16384)
CUTOFF = 100
PILOT = 512  # samples whose gradients choose coordinates
SKETCH_SEED, QUERY_SEED, CHOICE_SEED = 101, 102, 103  # the run's own is 0
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
        self.train, self.test = ([q for q in several if q.split == split] for split in ("train", "test"))
        ranks = Artifact("ranks", read_published(context.workspace).snapshot, context.workspace.root, 0)
        self.labels = candidate_scores(context.workspace, ranks, [query.query_id for query in self.test]).scores
        assert self.labels.shape[1] == self.samples.rows, "the candidates are not all samples"
        rows = torch.tensor([number for number, query in enumerate(several) if query.split == "test"])
        features = load_features(context, self.queries, self.samples)[rows]
        self.untuned = cosines(features, load_features(context, self.samples, self.samples))
        self.width = features.shape[1]

    def gradients(self, train_ids: list[int], seed: int) -> Iterator[SampleGradients]:
        micro_batch = self.context.micro_batch("gradients")
        block = load_block(self.context, self.latents, train_ids)
        return sample_gradients(self.model, self.layers, noise_plan(self.config, seed), block, micro_batch)

    def blocks(self) -> Iterator[list[int]]:
        for start in range(0, self.samples.rows, BLOCK):
            yield list(range(start, min(start + BLOCK, self.samples.rows)))

    def eigen(self, size: int) -> EigenSketch:
        pilot = np.random.default_rng(0).choice(self.samples.rows, min(PILOT, self.samples.rows), replace=False)
        seen = sample_moments(self.fisher, self.gradients(np.sort(pilot).tolist(), CHOICE_SEED))
        steps = step_moments(self.fisher, (self.steps([query], CHOICE_SEED) for query in self.train))
        return EigenSketch.of_most_energy(self.fisher, seen, steps, size)

    def steps(self, queries: list[Query], seed: int) -> dict[str, Tensor]:
        """Return the unlearning steps of some queries by layer, (queries, d_out, d_in)."""
        gradients = [gradient_of(self.context, query, seed) for query in queries]
        updates = [update_of(self.context, gradient, self.fisher, self.samples.rows) for gradient in gradients]
        return {name: torch.stack([update[name] for update in updates]) for name in updates[0]}

    def row(self, name: str, scores: Tensor, bytes_each: float, seconds: float) -> str:
        precision = average_precision(scores.double(), top_mask(self.labels.double(), CUTOFF))
        error = precision.std() / len(precision) ** 0.5
        rho = spearman(self.labels.double(), scores.double()).mean()
        return f"| {name} | {bytes_each:,.0f} | {seconds:.2f} | {precision.mean():.3f} ± {error:.3f} | {rho:.3f} |"


@torch.no_grad()
def run(context: Context) -> None:
    bench = Bench(context)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {context.device}, Python {platform.python_version()}"
    print(f"{machine}, {packages}")
    sketch = bench.eigen(max(SIZES))
    started = time.monotonic()
    gradients = [gradient_of(context, query, QUERY_SEED) for query in bench.test]
    seconds = (time.monotonic() - started) / len(gradients)
    print(f"{bench.samples.rows:,} samples, {len(gradients)} test queries, {seconds:.2f} s for the gradient of each")

    updates = [update_of(context, gradient, bench.fisher, bench.samples.rows) for gradient in gradients]
    stacked = {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
    kept, exact, rounded, filled, contracting = [], [], [], 0, 0.0
    for train_ids in bench.blocks():
        for some in bench.gradients(train_ids, SKETCH_SEED):
            kept.append(sketch.of_samples(some)[:, 0])
            factored = FactoredSketch.of_samples(some)
            exact.append(factored.scores(some.inputs, [stacked]))
            packed = Int8Vectors.of(factored.deltas.flatten(0, 1))
            filled += int((packed.scales.amax(1) > 0).sum()) * bytes_of(packed.values.shape[1])
            short = replace(factored, deltas=packed.dense().view_as(factored.deltas))
            started = time.monotonic()
            rounded.append(short.scores(some.inputs, [stacked]))
            contracting += (time.monotonic() - started) / len(gradients)
    sketches, asked = torch.cat(kept), torch.stack([sketch.of_query(gradient) for gradient in gradients])

    print("\n| | bytes a sample | s a query beside its gradient | mAP(100) | Spearman |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print(bench.row("untuned features, centred", bench.untuned, 4 * bench.width, 0))
    for size in SIZES:
        packed, started = Int8Vectors.of(sketches[:, :size]), time.monotonic()
        scores = asked[:, :size] @ packed.dense().T
        seconds = (time.monotonic() - started) / len(asked)
        print(bench.row(f"eigen sketch, {size:,} numbers of one byte", scores, bytes_of(size), seconds))
        print(bench.row(f"the same in float32, {size:,}", asked[:, :size] @ sketches[:, :size].T, 4 * size, seconds))
    weights = sum(layer.weight.numel() for layer in bench.layers.values())
    bytes_each = filled / bench.samples.rows
    print(bench.row("factored sketch, one byte a number", torch.cat(rounded, 1), bytes_each, contracting))
    print(bench.row("the whole gradient", torch.cat(exact, dim=1), 4 * weights, contracting))
    print(f"\nEnergy kept by {max(SIZES):,} coordinates: {sketch.energy_kept:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    run(open_context(load_config(parser.parse_args().config)))


if __name__ == "__main__":
    main()
