"""What the teachers cost on the demo's model and data, each against an alternative in the same run; Markdown tables.

Run: python benchmarks/teachers.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stages import make_latents
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import Fisher, load_fisher
from fastgda_core.curvature.layers import Layer, input_rows, matrix_shape
from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel, model_hash
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stream_key, uniform
from fastgda_core.diffusion.precision import Precision
from fastgda_core.evaluation.ranking_metrics import spearman
from fastgda_core.teachers.gradients import output_gradients, weight_gradient
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, plan_rows, row_inputs, training_losses
from fastgda_core.teachers.unlearning import moved, query_gradient, unlearning_update
from flows.demo import prepare
from tasks.config.files import load_config
from tasks.context import Context
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tasks.teaching.curvature import make_curvature
from tasks.teaching.latents import load_block

PLAN = NoisePlan(seed=0, timesteps=10, draws=1)  # the published one
MICRO_BATCH = 64
KRONFLUENCE_BATCH = 64
COMPILED = "ours, compiled"
SIDES = ("ours", COMPILED, "kronfluence")
REPEATS = 3
ALPHAS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
TABLES = ("cost", "kronfluence", "noise", "steps")
PUBLISHED = {"queries": 5_000, "candidates": 10_000, "samples": 118_287}  # MSCOCO


@dataclass(frozen=True)
class Setting:
    """The demo's model with samples, a Fisher and Delta theta of its queries."""

    folder: Path
    model: DiffusionModel
    layers: dict[str, Layer]
    block: SampleBlock
    fisher: Fisher
    query_latents: Tensor
    query_captions: list[str]
    updates: dict[str, Tensor] = field(default_factory=dict)

    @property
    def one_update(self) -> dict[str, Tensor]:
        return {name: change[0] for name, change in self.updates.items()}


def set_up(folder: Path, samples: int, pairs: int | None) -> Setting:
    """Everything made or found in `folder`; without Delta theta where `pairs` is None."""
    config = load_config(prepare(folder))
    context = Context(config, model_hash(config.model.folder))
    ingested = ingest_samples.fn(context).artifact
    queries = load_queries(make_queries.fn(context, ingested).artifact)
    latents = make_latents(context, ingested)
    model = context.model()
    chosen = np.random.default_rng(3).choice(ingested.rows, samples, replace=False)
    setting = Setting(
        folder,
        model,
        context.layers(model),
        load_block(context, latents, np.sort(chosen).tolist()),
        load_fisher(make_curvature(context, latents).path),
        model.encode_images([query.image for query in queries]),
        [query.caption for query in queries],
    )
    if pairs is None:
        return setting
    return replace(setting, updates=query_updates(setting, pairs, config.teacher.alpha, ingested.rows))


def query_updates(setting: Setting, pairs: int, alpha: float, training_size: int) -> dict[str, Tensor]:
    model = setting.model
    several = []
    for number, (latent, caption) in enumerate(zip(setting.query_latents, setting.query_captions, strict=True)):
        gradient = query_gradient(
            model,
            setting.layers,
            latent,
            model.encode_captions([caption]),
            owner=number,
            seed=0,
            pairs=pairs,
            micro_batch=MicroBatch(MICRO_BATCH),
        )
        several.append(unlearning_update(setting.fisher, gradient, alpha=alpha, training_size=training_size))
    return {name: torch.stack([update[name] for update in several]) for name in several[0]}


def timed(*works: Callable[[], object]) -> list[float]:
    """Median seconds of each, taken in turns, so that a slow minute of the machine hits all alike."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for number, work in enumerate(works):
            started = time.monotonic()
            work()
            seconds[number].append(time.monotonic() - started)
    return [statistics.median(each) for each in seconds]


def print_exact(setting: Setting, candidates: int) -> float:
    """One query against its candidates; returns our seconds per pair."""
    model, layers, update = setting.model, setting.layers, setting.one_update
    block = setting.block.samples(slice(0, candidates))
    rows = plan_rows(model, PLAN, block)
    base = training_losses(model, PLAN, block, MicroBatch(MICRO_BATCH))

    def one_by_one() -> None:
        """A pass over the samples, one caption with its timesteps at a time."""
        for start in range(0, len(rows), rows.per_caption):
            with torch.no_grad():
                model.losses(*row_inputs(PLAN, block, rows, slice(start, start + rows.per_caption)))

    def straightforward() -> None:
        one_by_one()
        with moved(layers, update):
            one_by_one()

    def cached() -> None:
        with moved(layers, update):
            one_by_one()

    def in_format(memory_format: torch.memory_format, work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            model.denoiser.to(memory_format=memory_format)
            work()

        return run

    def ours(with_model: DiffusionModel) -> Callable[[], object]:
        return lambda: exact_scores(with_model, layers, PLAN, block, base, update, MicroBatch(MICRO_BATCH))

    works = {
        "straightforward: base losses again, a sample at a time": in_format(torch.contiguous_format, straightforward),
        "base losses cached": in_format(torch.contiguous_format, cached),
        f"and {MICRO_BATCH} forwards at a time": in_format(torch.contiguous_format, ours(model)),
        "and channels-last (ours)": in_format(torch.channels_last, ours(model)),
        "and compiled (`model.compile`)": in_format(torch.channels_last, ours(model.compiled())),
    }
    seconds = timed(*works.values())
    model.denoiser.to(memory_format=torch.channels_last)
    print(f"\n### Exact: one query, {len(block.train_ids)} candidates, {PLAN.timesteps} timesteps\n")
    print("| | seconds | against the first |\n| --- | ---: | ---: |")
    for name, value in zip(works, seconds, strict=True):
        print(f"| {name} | {value:.2f} | {seconds[0] / value:.2f} x |")
    return seconds[3] / len(block.train_ids)


def print_first_order(setting: Setting, exact_per_pair: float) -> None:
    queries, block = len(setting.query_captions), setting.block
    model, layers, wide = setting.model, setting.layers, 500
    generator = torch.Generator().manual_seed(0)
    many = {name: torch.randn(wide, *matrix_shape(layer), generator=generator) for name, layer in layers.items()}
    one = {name: change[:1] for name, change in setting.updates.items()}
    part = block.samples(slice(0, 64))

    def scores(samples: SampleBlock, updates: dict[str, Tensor]) -> Callable[[], object]:
        return lambda: first_order_scores(model, layers, PLAN, samples, [updates], MicroBatch(MICRO_BATCH))

    def losses() -> object:
        return training_losses(model, PLAN, part, MicroBatch(MICRO_BATCH))

    ours, with_many, with_one, forward = timed(
        scores(block, setting.updates), scores(part, many), scores(part, one), losses
    )
    samples = len(block.train_ids)
    exact = exact_per_pair * queries * samples
    print(f"\n### First order: {queries} queries x {samples} samples, {PLAN.timesteps} timesteps\n")
    print("| | seconds | |\n| --- | ---: | ---: |")
    print(f"| exact, from its cost per pair above | {exact:.0f} | |")
    print(f"| first order | {ours:.1f} | {exact / ours:.1f} x |")
    print(f"| a forward and backward, in forwards | | {with_one / forward:.2f} |")
    contraction = max(with_many - with_one, 0.0) / (wide - 1) / len(part.train_ids)
    per_sample = with_one / len(part.train_ids)
    projected = PUBLISHED["samples"] * (per_sample + PUBLISHED["queries"] * contraction)
    pairs = PUBLISHED["queries"] * PUBLISHED["candidates"]
    exact_projected = pairs * exact_per_pair
    print(
        f"\nProjected from these costs to {PUBLISHED['queries']:,} queries x {PUBLISHED['candidates']:,} candidates of "
        f"{PUBLISHED['samples']:,}: the exact teacher scores {pairs:,} pairs at {1000 * exact_per_pair:.1f} ms each; "
        f"the first-order one runs each of the {PUBLISHED['samples']:,} samples once ({1000 * per_sample:.1f} ms) and "
        f"contracts it with every query ({1e6 * contraction:.1f} us each, measured with {wide} at a time), which "
        f"scores {PUBLISHED['samples'] * PUBLISHED['queries']:,} pairs.\n"
    )
    print("| projected | hours of this machine | |\n| --- | ---: | ---: |")
    print(f"| exact | {exact_projected / 3600:,.0f} | |")
    print(f"| first order | {projected / 3600:,.1f} | {exact_projected / projected:.0f} x |")


def print_noise(setting: Setting) -> None:
    block, model = setting.block, setting.model
    rows = plan_rows(model, PLAN, block)
    stretch = slice(0, MICRO_BATCH)
    inputs = row_inputs(PLAN, block, rows, stretch)
    sample, caption = rows.sample[stretch], rows.caption[stretch]

    def noise() -> object:
        return PLAN.noise(
            block.train_ids[sample],
            rows.flip[stretch],
            block.caption_number[caption],
            rows.timestep[stretch],
            rows.draw[stretch],
            model.latent_shape,
        )

    def forward() -> object:
        with torch.no_grad():
            return model.losses(*inputs)

    drawn, ran = timed(noise, forward)
    print(
        f"\n### Noise\n\n{MICRO_BATCH} noise tensors take {1000 * drawn:.2f} ms, their forward {1000 * ran:.0f} ms:",
        end=" ",
    )
    print(f"{drawn / ran:.1%} (at most 5 %).")


def print_step_sizes(setting: Setting) -> None:
    """The exact teacher in float32 against float64, for steps of several lengths along the same directions."""
    model, layers, block = setting.model, setting.layers, setting.block.samples(slice(0, 64))
    plan = NoisePlan(seed=0, timesteps=5, draws=1)
    double = model.in_precision(Precision.float64)
    double_layers = {name: double.denoiser.get_submodule(name) for name in layers}
    micro_batch = MicroBatch(MICRO_BATCH)
    chosen = range(0, len(setting.query_captions), len(setting.query_captions) // 4)
    # Delta theta is (alpha / N) F^-1 g: with alpha = 1, what the steps are fractions of.
    unit = {name: change[list(chosen)] / 1e-5 for name, change in setting.updates.items()}
    slope = first_order_scores(double, double_layers, plan, block, [unit], micro_batch)
    base = training_losses(model, plan, block, micro_batch), training_losses(double, plan, block, micro_batch)
    print("\n### Step size\n\n64 samples x 5 timesteps, 4 queries; means over queries.\n")
    print(
        "| alpha | float32 exact vs float64 first order, Spearman | vs float64 exact, Spearman "
        "| float64 first order vs float64 exact, relative error |\n| ---: | ---: | ---: | ---: |"
    )
    for alpha in ALPHAS:
        steps = [{name: alpha * change[row] for name, change in unit.items()} for row in range(len(chosen))]
        single = torch.stack([exact_scores(model, layers, plan, block, base[0], step, micro_batch) for step in steps])
        fine = torch.stack(
            [exact_scores(double, double_layers, plan, block, base[1], step, micro_batch) for step in steps]
        )
        error = ((alpha * slope - fine).norm(dim=1) / fine.norm(dim=1)).mean()
        first, second = spearman(single, slope).mean(), spearman(single, fine).mean()
        print(f"| {alpha:.0e} | {first:.4f} | {second:.4f} | {error:.1e} |")


def kronfluence_scores(setting: Setting, scratch: Path) -> Tensor:
    """kronfluence's pairwise influence, (queries, samples): one row a query, the plan's rows for each sample."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from safetensors.torch import save_file

    model = setting.model

    class Diffusion(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            clean, text, timesteps, noise = batch
            condition = {"encoder_hidden_states": text}
            return per_sample_loss(model, setting.model.schedule, clean, condition, timesteps, noise).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(setting.layers)

    task = Diffusion()
    analyzer = Analyzer(
        "scores", prepare_model(model.denoiser, task), task, cpu=True, output_dir=str(scratch), disable_tqdm=True
    )
    # Our factors, in its own files: both sides precondition with the same Fisher.
    factors = analyzer.factors_output_dir("ours")
    factors.mkdir(parents=True, exist_ok=True)
    parts = setting.fisher.layers  # type: ignore[attr-defined]
    contents = {
        "activation_eigenvectors": {name: part.input_basis for name, part in parts.items()},
        "gradient_eigenvectors": {name: part.output_basis for name, part in parts.items()},
        # Looked for, and not used: EK-FAC has Lambda.
        "activation_eigenvalues": {name: torch.ones(len(part.input_basis)) for name, part in parts.items()},
        "gradient_eigenvalues": {name: torch.ones(len(part.output_basis)) for name, part in parts.items()},
        "lambda_matrix": {name: part.eigenvalues for name, part in parts.items()},
        "num_lambda_processed": {name: torch.ones(1, dtype=torch.int64) for name in parts},
    }
    for name, tensors in contents.items():
        save_file({layer: tensor.contiguous() for layer, tensor in tensors.items()}, factors / f"{name}.safetensors")
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    analyzer._save_arguments("factor", arguments, factors, overwrite_output_dir=True)
    with torch.enable_grad():
        analyzer.compute_pairwise_scores(
            "scores",
            "ours",
            TensorDataset(*query_rows(setting)),
            TensorDataset(*sample_rows(setting)),
            per_device_query_batch_size=len(setting.query_captions),
            per_device_train_batch_size=KRONFLUENCE_BATCH,
            score_args=ScoreArguments(damping_factor=None),
            overwrite_output_dir=True,
        )
    scores = analyzer.load_pairwise_scores("scores")["all_modules"].double()
    rows = plan_rows(model, PLAN, setting.block)
    summed = torch.zeros(len(scores), len(setting.block.train_ids), dtype=torch.float64)
    return summed.index_add_(1, rows.sample, scores * rows.share)


def sample_rows(setting: Setting) -> tuple[Tensor, ...]:
    rows = plan_rows(setting.model, PLAN, setting.block)
    clean, condition, timesteps, noise = row_inputs(PLAN, setting.block, rows, slice(0, len(rows)))
    return clean, condition["encoder_hidden_states"], timesteps, noise


def query_rows(setting: Setting) -> tuple[Tensor, ...]:
    """The single Monte-Carlo pair that stands for each query here."""
    count, steps = len(setting.query_captions), setting.model.schedule.train_timesteps
    owners = torch.arange(count)
    timesteps = torch.cat([uniform(stream_key(0, "query timesteps"), owner, 1) for owner in range(count)])
    timesteps = (timesteps * steps).long()
    noise = gaussian_noise(
        stream_key(0, "query noise"), owners, timesteps, torch.zeros_like(owners), setting.model.latent_shape
    )
    text = setting.model.encode_captions(setting.query_captions)["encoder_hidden_states"]
    return setting.query_latents, text, timesteps, noise


def our_scores(setting: Setting, _scratch: Path) -> Tensor:
    """The same from ours: each query's gradient of one pair, its step, then the scores."""
    model, layers = setting.model, setting.layers
    clean, text, timesteps, noise = query_rows(setting)
    updates: dict[str, list[Tensor]] = {name: [] for name in layers}
    for start in range(0, len(clean), MICRO_BATCH):
        stretch = slice(start, start + MICRO_BATCH)
        condition = {"encoder_hidden_states": text[stretch]}
        _, seen, gradients = output_gradients(
            model, layers, clean[stretch], condition, timesteps[stretch], noise[stretch]
        )
        for name, layer in layers.items():
            of_rows = weight_gradient(gradients[name], input_rows(layer, seen[name]))
            updates[name].append(setting.fisher.solve(name, of_rows))
    stacked = {name: torch.cat(several) for name, several in updates.items()}
    return first_order_scores(model, layers, PLAN, setting.block, [stacked], MicroBatch(MICRO_BATCH))


def measured_alone(name: str, folder: Path, samples: int, times: int, result: Path) -> None:
    """In a process of its own: seconds and the rise of its peak memory while it scores; each query `times` times."""
    setting = set_up(folder, samples, None)
    setting = replace(
        setting,
        query_latents=setting.query_latents.repeat(times, 1, 1, 1),
        query_captions=setting.query_captions * times,
    )
    work = kronfluence_scores if name == "kronfluence" else our_scores
    if name == COMPILED:
        setting = replace(setting, model=setting.model.compiled())
        our_scores(replace(setting, block=setting.block.samples(slice(0, MICRO_BATCH))), Path())  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        scores = work(setting, Path(scratch))
        seconds = time.monotonic() - started
    torch.save({"seconds": seconds, "memory": resident("VmHWM") - before, "scores": scores}, result)


def resident(which: str) -> float:
    """GB of this process's memory, now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(which)).split()[1]) / 2**20


def print_kronfluence(setting: Setting, scratch: Path, samples: int) -> None:
    """Twice as many samples as half as many: what a sample costs beside the queries, which both prepare once."""
    sizes = (samples // 2, samples)
    print("\n### First order against kronfluence's pairwise scores\n")
    print(
        "Same pairs, factors, layers and noise, one Monte-Carlo pair a query, from the factors to the scores; "
        f"{PLAN.timesteps} timesteps. Seconds are for {sizes[1]} samples, ms a sample for the step from {sizes[0]} to "
        f"{sizes[1]}: the rest prepares the queries, once. Compiling is not counted. Memory is the peak above the "
        "loaded model.\n"
    )
    print("| queries | | ours | ours, compiled | kronfluence | against ours | against compiled |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for times in (1, 10):
        found: dict[tuple[str, int], list[dict[str, Any]]] = {(name, size): [] for size in sizes for name in SIDES}
        for _ in range(REPEATS):
            for (name, size), runs in found.items():
                result = scratch / "result.pt"
                arguments = (name, setting.folder, size, times, result)
                process = multiprocessing.get_context("spawn").Process(target=measured_alone, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{name} with {size} samples ended with exit code {process.exitcode}")
                runs.append(torch.load(result))
        whole, half = ([min(run["seconds"] for run in found[name, size]) for name in SIDES] for size in sizes[::-1])
        each = [1000 * (more - less) / (sizes[1] - sizes[0]) for more, less in zip(whole, half, strict=True)]
        queries = times * len(setting.query_captions)
        for what, (ours, compiled, theirs), digits in (("ms a sample", each, 0), ("seconds", whole, 1)):
            values = " | ".join(f"{value:.{digits}f}" for value in (ours, compiled, theirs))
            print(f"| {queries} | {what} | {values} | {theirs / ours:.2f} x | {theirs / compiled:.2f} x |")
        ours, theirs = (min(run["memory"] for run in found[name, sizes[1]]) for name in ("ours", "kronfluence"))
        print(f"| {queries} | GB | {ours:.2f} | | {theirs:.2f} | {theirs / ours:.2f} x | |")
        scores = {name: found[name, sizes[1]][0]["scores"] for name in SIDES}
        agreement = [spearman(scores[name], scores["kronfluence"]).min() for name in ("ours", COMPILED)]
        print(f"| {queries} | lowest Spearman of a query | | | | {agreement[0]:.6f} | {agreement[1]:.6f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=64, help="in a query's gradient")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--folder", type=Path, help="where the demo's data lies or is made; default: a temporary one")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "kronfluence"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder.resolve() if arguments.folder else Path(scratch) / "demo"
        setting = set_up(folder, arguments.samples, arguments.pairs)
        print(f"{os.cpu_count()} cores ({platform.machine()}), no GPU, Python {platform.python_version()}, {packages}.")
        if "cost" in arguments.tables:
            print_first_order(setting, print_exact(setting, arguments.candidates))
        if "kronfluence" in arguments.tables:
            print_kronfluence(setting, Path(scratch), arguments.candidates)
        if "noise" in arguments.tables:
            print_noise(setting)
        if "steps" in arguments.tables:
            print_step_sizes(setting)


if __name__ == "__main__":
    main()
