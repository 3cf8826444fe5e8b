"""What a denoiser of Stable Diffusion 1.4's shape (860 M random weights) gets out of a GPU; Markdown tables.

Imports nothing but torch, numpy, diffusers and fastgda_core, so that it runs where only those are.

Run: PYTHONPATH=. python benchmarks/sd_unet.py --gpu
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastgda_core.curvature.fisher import EkfacFisher, LayerFactors
from fastgda_core.curvature.layers import Layer, matrix_shape, select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.precision import Precision, multiplying
from fastgda_core.diffusion.schedule import DiffusionSchedule
from fastgda_core.sketches.eigen import EigenSketch
from fastgda_core.sketches.int8 import Int8Vectors, bytes_of
from fastgda_core.sketches.principal import PrincipalSketch
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import SampleGradients
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, plan_rows, row_inputs, training_losses
from fastgda_core.teachers.unlearning import query_gradients

PRECISIONS = (Precision.float32, Precision.tf32, Precision.bf16)
PLAN = NoisePlan(seed=0, timesteps=10, draws=1)  # the published one
REPEATS = 3
STEP = 1e-5  # of a random update: cost does not depend on it
PAIRS = (16, 64)  # of a query's gradient
GROUPS = 4  # of pairs, for standard errors
MSCOCO = 118_287  # training images of 2017


@dataclass(frozen=True)
class Size:
    """What to measure on: the denoiser's config, the captions, and how much of everything."""

    denoiser: dict[str, Any]
    tokens: int
    micro_batch: int
    samples: int
    queries: int
    matmul: int  # rows of the square matrices whose product stands for the card's rate
    coordinates: int  # of the eigenbasis, and numbers of a sketch
    numbers: int
    sketched: int  # samples that a query is compared with

    @property
    def rows(self) -> int:
        return self.samples * PLAN.timesteps


SIZES = {
    # CompVis/stable-diffusion-v1-4, unet/config.json; what it leaves out are diffusers' defaults, which are the same.
    "sd": Size(
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        tokens=77,
        micro_batch=16,
        samples=16,
        queries=48,
        matmul=8192,
        coordinates=131_072,
        numbers=1024,
        sketched=MSCOCO,
    ),
    # For a look at the logic on a CPU.
    "tiny": Size(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        tokens=5,
        micro_batch=4,
        samples=4,
        queries=3,
        matmul=64,
        coordinates=128,
        numbers=16,
        sketched=1000,
    ),
}


@dataclass(frozen=True)
class Row:
    """One precision: rates per second, the card's own rate in FLOP per second, peak memory in GB by what ran."""

    precision: Precision
    matmul: float
    forwards: float
    compiled: float | str  # the reason where it does not compile
    exact: float | None  # an exact teacher refuses what is coarser than float32
    first_order: float
    memory: dict[str, float]


def random_model(size: Size, device: torch.device) -> DiffusionModel:
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(**size.denoiser).eval().requires_grad_(False).to(device)
    denoiser.to(memory_format=torch.channels_last)  # as `load_model` keeps it
    return DiffusionModel(denoiser, DiffusionSchedule(DDIMScheduler()), None, None, device)  # type: ignore[arg-type]


def random_block(size: Size, model: DiffusionModel) -> SampleBlock:
    generator, device = torch.Generator().manual_seed(0), model.device
    latents = torch.randn(size.samples, 1, *model.latent_shape, generator=generator)
    text = torch.randn(size.samples, size.tokens, size.denoiser["cross_attention_dim"], generator=generator)
    number = torch.arange(size.samples, device=device)
    condition = {"encoder_hidden_states": text.to(device)}
    return SampleBlock(number, latents.to(device), condition, number, torch.zeros_like(number))


def random_updates(layers: dict[str, Layer], queries: int, device: torch.device) -> dict[str, Tensor]:
    return {
        name: STEP * torch.randn(queries, *matrix_shape(layer), device=device) / matrix_shape(layer)[1] ** 0.5
        for name, layer in layers.items()
    }


def forward_flops(size: Size) -> int:
    """FLOPs of one forward, attention's products included: no kernel hides them, and nothing is computed."""
    side, channels = size.denoiser["sample_size"], 4
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        text = torch.empty(1, size.tokens, size.denoiser["cross_attention_dim"])
        UNet2DConditionModel(**size.denoiser)(torch.empty(1, channels, side, side), torch.empty(1), text)
    return counter.get_total_flops()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, *works: Callable[[], object]) -> list[float]:
    """Median seconds of each, taken in turns after one go that does not count."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for number, work in enumerate(works):
            synchronise(device)
            started = time.perf_counter()
            work()
            synchronise(device)
            seconds[number].append(time.perf_counter() - started)
    return [statistics.median(each) for each in seconds]


def peak_memory(device: torch.device, work: Callable[[], object]) -> float:
    """GB of tensors at the peak while `work` runs, the weights included; not a number on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) / 2**30


def matmul_rate(precision: Precision, rows: int, device: torch.device) -> float:
    """FLOP per second of a large product of two square matrices in this precision."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    left, right = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    times = 10

    def products() -> None:
        with multiplying(precision):
            for _ in range(times):
                torch.mm(left, right)

    return times * 2 * rows**3 / timed(device, products)[0]


def forwards_of(model: DiffusionModel, block: SampleBlock, batch: int) -> Callable[[], None]:
    """All forwards of the plan; their inputs are made beforehand."""
    rows = plan_rows(model, PLAN, block)
    stretches = [slice(start, start + batch) for start in range(0, len(rows), batch)]
    inputs = [row_inputs(PLAN, block, rows, stretch) for stretch in stretches]

    def run() -> None:
        with torch.no_grad():
            for each in inputs:
                model.losses(*each)

    return run


def measured_forwards(model: DiffusionModel, block: SampleBlock, size: Size) -> tuple[float, float | str]:
    """Forwards per second as they are, and compiled; where the compiler fails, its first line instead."""
    torch.compiler.reset()
    eager = forwards_of(model, block, size.micro_batch)
    compiled = forwards_of(model.compiled(), block, size.micro_batch)
    try:
        plain, fast = timed(model.device, eager, compiled)
    except RuntimeError as error:  # what torch.compile raises, whichever part of it fails
        reason = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())[:120]
        return size.rows / timed(model.device, eager)[0], reason
    return size.rows / plain, size.rows / fast


def measured(
    model: DiffusionModel, layers: dict[str, Layer], block: SampleBlock, updates: dict[str, Tensor], size: Size
) -> Row:
    device, precision = model.device, model.precision
    batch = MicroBatch(size.micro_batch)
    one = {name: change[0] for name, change in updates.items()}

    def first_order() -> object:
        return first_order_scores(model, layers, PLAN, block, [updates], batch)

    matmul = matmul_rate(precision, size.matmul, device)
    forwards, compiled = measured_forwards(model, block, size)
    memory = {"forward": peak_memory(device, forwards_of(model, block, size.micro_batch))}
    if not isinstance(compiled, str):
        model = model.compiled()  # the scores are the fastest way's
    exact = None
    if precision.exact:
        base = training_losses(model, PLAN, block, batch)

        def exact_teacher() -> object:
            return exact_scores(model, layers, PLAN, block, base, one, batch)

        exact_seconds, seconds = timed(device, exact_teacher, first_order)
        exact = size.rows / exact_seconds
    else:
        seconds = timed(device, first_order)[0]
    memory["first order"] = peak_memory(device, first_order)
    if batch.size < size.micro_batch:
        print(f"\n{precision}: memory ran out, and the scores went {batch.size} at a time.")
    return Row(precision, matmul, forwards, compiled, exact, size.rows / seconds, memory)


def random_sketch(layers: dict[str, Layer], size: Size, device: torch.device) -> PrincipalSketch:
    """A sketch in a random eigenbasis, of random coordinates and directions: its cost does not depend on them."""

    def basis(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, rows, device=device))[0]

    factors = {}
    for name, layer in layers.items():
        d_out, d_in = matrix_shape(layer)
        factors[name] = LayerFactors(basis(d_in), basis(d_out), torch.rand(d_out, d_in, device=device))
    energy = {name: torch.rand(each.eigenvalues.numel(), device=device) for name, each in factors.items()}
    fisher = EkfacFisher(factors, damping=1.0)
    eigen = EigenSketch.of_most_energy(fisher, energy, energy, size.coordinates)
    directions = torch.randn(size.coordinates, size.numbers, device=device) / size.coordinates**0.5
    return PrincipalSketch(eigen, directions, torch.ones(size.numbers))


def print_sketches(
    models: list[DiffusionModel], layers: dict[str, Layer], block: SampleBlock, updates: dict[str, Tensor], size: Size
) -> None:
    """What a sample's sketch costs beside its scores, and what an answer costs."""
    device, batch = models[0].device, MicroBatch(size.micro_batch)
    sketch = random_sketch(layers, size, device)
    condition = {name: rows[:1] for name, rows in block.condition.items()}

    def keep(gradients: SampleGradients) -> None:
        Int8Vectors.of(sketch.of_samples(gradients).flatten(0, 1))

    def asked(model: DiffusionModel, pairs: int) -> dict[str, Tensor]:
        options = {"owner": 0, "seed": 0, "pairs": pairs, "groups": GROUPS, "micro_batch": batch}
        return query_gradients(model, layers, block.latents[0, 0], condition, **options)  # type: ignore[arg-type]

    weights = sum(layer.weight.numel() for layer in layers.values())
    print(
        f"\nSketches of {size.numbers:,} numbers out of {size.coordinates:,} coordinates of {weights:,} weights, "
        f"{bytes_of(size.numbers):,} bytes a sample: {bytes_of(size.numbers) * size.sketched / 1e9:.2f} GB for "
        f"{size.sketched:,} samples. Not compiled; a sample is {PLAN.timesteps} forwards.\n"
    )
    columns = "".join(f" | gradient of {pairs} pairs, s" for pairs in PAIRS)
    print(f"| | scores, ms a sample | and its sketch{columns} | its sketch, ms |")
    print("| --- | ---: | ---: |" + " ---: |" * len(PAIRS) + " ---: |")
    for model in models:
        works: list[Callable[[], object]] = [
            lambda model=model: first_order_scores(model, layers, PLAN, block, [updates], batch),  # type: ignore[misc]
            lambda model=model: first_order_scores(model, layers, PLAN, block, [updates], batch, keep),  # type: ignore[misc]
            *(lambda model=model, pairs=pairs: asked(model, pairs) for pairs in PAIRS),  # type: ignore[misc]
        ]
        gradient = asked(model, GROUPS)
        plain, both, *gradients = timed(device, *works)
        (turned,) = timed(device, lambda gradient=gradient: sketch.of_query(gradient))  # type: ignore[misc]
        cells = " | ".join(f"{seconds:.2f}" for seconds in gradients)
        each = 1e3 / size.samples
        print(f"| {model.precision} | {plain * each:.1f} | {both * each:.1f} | {cells} | {turned * 1e3:.1f} |")
    kept = Int8Vectors.of(torch.randn(size.sketched, size.numbers))
    there = Int8Vectors(kept.values.to(device), kept.scales.to(device))
    question = torch.randn(GROUPS, size.numbers)
    (near,) = timed(device, lambda: question.to(device) @ there.dense().T)
    (far,) = timed(torch.device("cpu"), lambda: question @ kept.dense().T)
    print(
        f"\nInner products of {GROUPS} groups with {size.sketched:,} sketches: {near * 1e3:.1f} ms on the device, "
        f"{far * 1e3:.0f} ms on {torch.get_num_threads()} cores beside it."
    )


def print_sd_unet(size: Size, device: torch.device, precisions: Sequence[Precision], table: str | None = None) -> None:
    """Everything, or one table, one precision after the other on the same weights."""
    model = random_model(size, device)
    layers = select_layers(model.denoiser, "cross-attn-kv")
    block, updates = random_block(size, model), random_updates(layers, size.queries, device)
    flops = forward_flops(size)
    parameters = sum(parameter.numel() for parameter in model.denoiser.parameters())
    print(f"\n### {parameters / 1e6:,.1f} M parameters on {device_name(device)}\n")
    print(
        f"{size.rows} rows ({size.samples} samples x {PLAN.timesteps} timesteps), {size.micro_batch} at a time; "
        f"latents {'x'.join(map(str, model.latent_shape))}, text {size.tokens}x{size.denoiser['cross_attention_dim']}; "
        f"{flops / 1e9:,.1f} GFLOP a forward; first order against {size.queries} queries. bf16 is autocast, weights "
        "stay float32."
    )
    possible = [one for one in precisions if one is not Precision.tf32 or device.type == "cuda"]
    models = [replace(model, precision=one) for one in possible]
    if table != "rates":
        print_sketches(models, layers, block, updates, size)
    if table != "sketches":
        measurements = [measured(model, layers, block, updates, size) for model in models]
        print_rates(measurements, flops)
        print_scores(measurements)


def print_rates(measurements: list[Row], flops: int) -> None:
    print("\n| | products, TFLOP/s | forwards/s | of the products' rate | compiled, forwards/s | of that rate | gain |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in measurements:
        plain = f"{row.matmul / 1e12:.1f} | {row.forwards:.1f} | {row.forwards * flops / row.matmul:.0%}"
        if isinstance(row.compiled, str):
            print(f"| {row.precision} | {plain} | does not compile: {row.compiled.replace('|', '/')} | | |")
        else:
            share, gain = row.compiled * flops / row.matmul, row.compiled / row.forwards
            print(f"| {row.precision} | {plain} | {row.compiled:.1f} | {share:.0%} | {gain:.2f} x |")


def print_scores(measurements: list[Row]) -> None:
    print("\nCompiled where that works:\n")
    print("| | exact, rows/s | first order, rows/s | in forwards | forward, peak GB | first order, peak GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in measurements:
        exact = "refused" if row.exact is None else f"{row.exact:.1f}"
        memory = " | ".join(f"{row.memory[what]:.1f}" for what in ("forward", "first order"))
        forwards = row.forwards if isinstance(row.compiled, str) else row.compiled
        print(f"| {row.precision} | {exact} | {row.first_order:.1f} | {forwards / row.first_order:.2f} | {memory} |")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU ({platform.machine()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="measure; needs a CUDA device")
    parser.add_argument("--table", choices=("sketches", "rates"), help="one alone; compiling, for rates, takes minutes")
    parser.add_argument("--precisions", nargs="+", type=Precision, choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--micro-batch", type=int, help="forwards at a time")
    parser.add_argument("--size", choices=SIZES, default="sd", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cuda = arguments.gpu and torch.cuda.is_available()
    if not cuda and arguments.size == "sd":
        parser.error("it takes --gpu and a CUDA device")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    print(f"Python {platform.python_version()}, {packages}.")
    size = SIZES[arguments.size]
    if arguments.micro_batch is not None:
        size = replace(size, micro_batch=arguments.micro_batch, samples=max(size.samples, arguments.micro_batch // 2))
    print_sd_unet(size, torch.device("cuda" if cuda else "cpu"), arguments.precisions, arguments.table)


if __name__ == "__main__":
    main()
