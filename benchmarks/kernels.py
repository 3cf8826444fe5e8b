"""Teachers of gradient features: what a projection costs, what the kernel of many samples holds, and their truth.

Tables, each by itself (`--tables`):
- cost: seconds of a sample's gradients alone, with each teacher's projection, and of first-order scores against
  sixteen queries; all layers of the config's model.
- memory: peak of the kernel's stage at 118,287 samples with made-up features, in a process of its own.
- judged: each teacher against models that were trained again, at a grid of ridges the best of which is chosen on the
  validation queries, beside captions, chance, the config's own teacher and the published one. Takes a finished run with
  a judge, and leaves the features in its workspace.

Run: python benchmarks/kernels.py CONFIG --tables cost memory judged
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from judged_teachers import HEAD, Setting, World, ahead, mean_lds, row
from stages import make_latents
from torch import Tensor

from fastgda_core.curvature.layers import matrix_shape, select_layers
from fastgda_core.diffusion.objective import Objective
from fastgda_core.sketches.projection import Projection
from fastgda_core.teachers.kernel import KERNEL_TEACHERS
from fastgda_core.teachers.kernels import DualKernel, PrimalKernel
from fastgda_core.teachers.sample_gradients import sample_gradients
from fastgda_core.teachers.scores import first_order_scores
from storage_schemas import tables
from tasks.config.files import load_config
from tasks.config.teaching import TeacherConfig
from tasks.context import Context, Loaded, open_context
from tasks.execution.plan import run_artifacts, run_name
from tasks.inputs.samples import ingest_samples
from tasks.teaching.kernel import FAMILY
from tasks.teaching.kernel_parts import ASKED, FEATURES, AskedParts, FeatureParts, ScratchTiles
from tasks.teaching.latents import latents_of, load_block
from tasks.teaching.noise import noise_plan
from tasks.teaching.run import read_run_anew

SAMPLES, TIMESTEPS, COUNT = 118_287, 10, 16  # of MSCOCO; of the cost's table
RIDGES = (0.0, *(10.0**power for power in range(-4, 9)))  # in the units of teacher.ridge
ASKED_AT_ONCE = 16  # queries of the first-order teacher
MADE_UP = 1024  # rows of made-up features at a time


def cost(context: Context) -> None:
    """Print seconds a sample, the best of three rounds, gradients alone and with each projection in turn."""
    latents = make_latents(context, ingest_samples.fn(context).artifact)
    block = load_block(context, latents, list(range(COUNT)))
    config = replace(context, config=with_teacher(context, TeacherConfig(name="trak", timesteps=TIMESTEPS)))
    plan, model = noise_plan(config.config), context.model()
    layers, micro_batch = select_layers(model.denoiser, "all"), context.micro_batch("gradients")
    sizes = {name: matrix_shape(layer)[0] * matrix_shape(layer)[1] for name, layer in layers.items()}

    def alone() -> None:
        for some in sample_gradients(model, layers, plan, block, micro_batch):
            for name in layers:
                some.of(name)

    print(f"\n{sum(sizes.values()):,} weights, {TIMESTEPS} timesteps, {COUNT} samples, best of 3\n")
    print("| | ms a sample | times the gradients alone |\n| --- | ---: | ---: |")
    base = best_of(alone)
    print(f"| gradients alone | {base:.1f} | 1.00 |")
    for name in ("trak", "d_trak", "dmin"):
        method = KERNEL_TEACHERS[name]
        projection = Projection.drawn(sizes, method.dimensions, 0, context.device)
        seen = model.with_objective(method.objective)
        spent = best_of(lambda: method.of_samples(seen, layers, plan, block, projection, micro_batch))  # noqa: B023
        print(f"| {name}, {method.dimensions:,} numbers | {spent:.1f} | {spent / base:.2f} |", flush=True)
    draw = torch.Generator().manual_seed(0)
    updates = [
        {name: torch.randn(ASKED_AT_ONCE, *matrix_shape(layer), generator=draw) for name, layer in layers.items()}
    ]
    spent = best_of(lambda: first_order_scores(model, layers, plan, block, updates, micro_batch))
    print(f"| first-order teacher, {ASKED_AT_ONCE} queries | {spent:.1f} | {spent / base:.2f} |")


def best_of(work: object) -> float:
    """Return milliseconds a sample, the best of three rounds."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        work()  # type: ignore[operator]
        found.append((time.perf_counter() - started) / COUNT * 1e3)
    return min(found)


def memory(sizes: list[int], samples: int) -> None:
    """Print the peak of the kernel's stage, each size in a process of its own."""
    print(f"\n{samples:,} samples, made-up features, 512 queries\n")
    print("| numbers of a feature | peak, MB | of it before the kernel | seconds |\n| ---: | ---: | ---: | ---: |")
    for size in sizes:
        arguments = [sys.executable, __file__, "--kernel-of", str(size), "--samples", str(samples)]
        print(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def kernel_of(size: int, samples: int) -> None:
    """Make a kernel of made-up features and print its row."""

    rows = torch.randn(MADE_UP, size, generator=torch.Generator().manual_seed(0))

    def blocks() -> Iterator[Tensor]:
        for start in range(0, samples, MADE_UP):
            yield rows[: samples - start].roll(start // MADE_UP, dims=1)

    before, started = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kernel = PrimalKernel(blocks, size, 500 / size, ScratchTiles(Path(folder), torch.device("cpu")))
        kernel.of(torch.randn(512, size))
    print(f"| {size:,} | {peak():,.0f} | {before:,.0f} | {time.perf_counter() - started:.0f} |")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def with_teacher(context: Context, teacher: TeacherConfig):  # type: ignore[no-untyped-def]
    return context.config.model_copy(update={"teacher": teacher})


def judged(context: Context, several_layers: list[str], at_checkpoints: bool) -> None:
    """Print the table of truth."""
    world = World(context)
    world.introduce()
    print(f"\n{HEAD}")
    cheap = {name: scores for name, scores in world.cheap().items() if name in ("random", "captions, centred")}
    rivals = {**cheap, **own_and_published(world)}
    for name, scores in rivals.items():
        print(row(world, name, scores), flush=True)
    best: dict[str, Tensor] = {}
    places = list(range(len(context.config.teacher.checkpoints))) if at_checkpoints else [None]
    for layers, name in itertools.product(several_layers, KERNEL_TEACHERS):
        found = [dict(chosen_and_default(world, name, layers, place)) for place in places]
        if name == "tracin" and at_checkpoints:
            found.append(
                {f"{name}, {layers}, sum over checkpoints": sum(each for one in found for each in one.values())}
            )
        for label, scores in (item for one in found for item in one.items()):
            best[label] = scores
            print(row(world, label, scores), flush=True)
    print("\n| ahead on test of | " + " | ".join(list(rivals)[1:]) + " |\n| --- | ---: | ---: | ---: |")
    for label, scores in best.items():
        leads = [ahead(world.lead(scores, rivals[name], "test")) for name in list(rivals)[1:]]
        print(f"| {label} | {' | '.join(leads)} |")


def own_and_published(world: World) -> dict[str, Tensor]:
    """Return the scores of the run's teacher as they are published, and those of AbU+ with the paper's settings."""
    context, names = world.context, [query.query_id for query in world.several]
    artifacts = run_artifacts(context, world.samples, world.queries)
    run = read_run_anew(str(context.workspace.root), run_name(context, artifacts))
    own = torch.full((len(names), world.samples.rows), torch.nan, dtype=torch.float64)
    for number in range(run.scores.count):
        for line in tables.read(run.scores.path(number), tables.SCORES).to_pylist():
            own[names.index(line["query_id"]), line["train_id"]] = line["score"]
    published = dict(world.scores(Objective.loss, "cross-attn-kv", 1.0, context.model()))
    return {
        f"{context.config.name}, {len(context.config.teacher.checkpoints)} checkpoints": own,
        "abu_plus_first_order as published": published[Setting(Objective.loss, "cross-attn-kv", 1.0, 0.1, "")],
    }


def chosen_and_default(world: World, name: str, layers: str, place: int | None) -> Iterator[tuple[str, Tensor]]:
    """Yield a teacher's scores as its authors have it, and with the ridge that is best on validation queries."""
    where = (
        layers if place is None else f"{layers}, {world.context.config.teacher.checkpoints[place].name} of the steps"
    )
    method, phi, asked = KERNEL_TEACHERS[name], *features(world, name, layers, place)
    if method.ridge is None:
        yield f"{name}, {where}", method.scores(asked, phi)
        return
    found = {}
    for ridge in {method.ridge, *RIDGES}:
        kernel = DualKernel(phi[:, 0], method.lambda_of(ridge, method.dimensions))
        found[ridge] = method.scores(kernel.of(asked), phi)
    chosen = max(sorted(found), key=lambda ridge: mean_lds(world, found[ridge], "validation"))
    yield f"{name}, {where}, ridge {method.ridge:g} (authors')", found[method.ridge]
    yield f"{name}, {where}, ridge {chosen:g} (validation)", found[chosen]


def features(world: World, name: str, layers: str, place: int | None) -> tuple[Tensor, Tensor]:
    """Make what is missing of a teacher's features: (samples, flips, d) and (queries, d)."""
    several, hashes = world.context.config.teacher.checkpoints, world.context.checkpoint_hashes
    here = slice(0) if place is None else slice(place, place + 1)
    teacher = TeacherConfig(name=name, layers=layers, timesteps=TIMESTEPS, checkpoints=several[here])  # type: ignore[arg-type]
    config = with_teacher(world.context, teacher)
    context = replace(world.context, config=config, checkpoint_hashes=hashes[here], loaded=Loaded())
    made = {artifact.name: artifact for artifact in FAMILY.artifacts(context, world.samples, world.queries)}
    samples = FeatureParts(context, latents_of(context, world.samples), made[FEATURES])
    asked = AskedParts(context, world.queries, made[ASKED])
    for parts in (samples, asked):
        for number in parts.missing():
            parts.make(number)
    phi = torch.cat([samples.load(number)[1] for number in range(samples.count)])
    return phi, asked.load(list(range(asked.count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--tables", nargs="+", choices=("cost", "memory", "judged"), default=["cost"])
    parser.add_argument("--layers", nargs="+", default=["all", "cross-attn-kv"])
    parser.add_argument("--at-checkpoints", action="store_true", help="judged: at each of the config's, not at the end")
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 16_384, 32_768])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--kernel-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kernel_of:
        kernel_of(arguments.kernel_of, arguments.samples)
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {packages}")
    if "memory" in arguments.tables:
        memory(arguments.sizes, arguments.samples)
    if arguments.config is None:
        return
    context = open_context(load_config(arguments.config))
    if "cost" in arguments.tables:
        cost(context)
    if "judged" in arguments.tables:
        judged(context, arguments.layers, arguments.at_checkpoints)


if __name__ == "__main__":
    main()
