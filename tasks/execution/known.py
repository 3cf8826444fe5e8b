"""What was measured or counted elsewhere, for an estimate without the model or without the device: with its source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastgda_core.curvature.layers import Layer, matrix_shape
from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """What one forward of a denoiser takes, and how large its inputs are.

    flops: of a forward, two for a multiplication and its addition.
    caption_flops: of encoding one caption.
    latent, condition: numbers of a sample's latent and of one caption's embeddings.
    layers, layer_weights: which a step moves.
    fisher_numbers: of their EK-FAC factors, both eigenbases and the eigenvalues.
    """

    flops: float
    caption_flops: float
    latent: int
    condition: int
    layers: int
    layer_weights: int
    fisher_numbers: int

    @classmethod
    def of(cls, flops: float, caption_flops: float, latent: int, condition: int, layers: Iterable[Layer]) -> ModelShape:
        """Return the shape of a denoiser whose step moves these layers."""
        sizes = [matrix_shape(layer) for layer in layers]
        weights = sum(rows * columns for rows, columns in sizes)
        fisher = weights + sum(rows**2 + columns**2 for rows, columns in sizes)
        return cls(flops, caption_flops, latent, condition, len(sizes), weights, fisher)


# By benchmarks/forward_flops.py (benchmarks/RESULTS.md, "One forward"), of the layers `cross-attn-kv`.
MODELS = {
    "fastgda_coco": ModelShape(6_122_917_888, 45_127_233_536, 1_024, 78_848, 32, 7_077_888, 42_237_952),
    "sd14": ModelShape(803_273_441_280, 13_298_503_680, 16_384, 59_136, 32, 19_169_280, 62_824_448),
    "sdxl": ModelShape(6_761_236_398_080, 111_158_333_440, 65_536, 158_982, 140, 340_787_200, 1_132_789_760),
    "sd3": ModelShape(8_904_337_539_072, 2_507_750_084_608, 262_144, 1_366_016, 48, 113_319_936, 339_959_856),
    "flux": ModelShape(74_384_653_418_496, 4_858_021_613_568, 262_144, 2_097_920, 38, 358_729_728, 1_076_189_222),
}


@dataclass(frozen=True)
class Device:
    """How many FLOP a second a device makes of forwards and backwards, by precision; worked out where not measured."""

    title: str
    flops_per_second: Mapping[Precision, float]
    source: str


DEVICES = {
    # 10 timesteps of 2.1 x 803 GFLOP in 661.8, 289.6 and 109.1 ms.
    "h100": Device(
        "NVIDIA H100 80GB HBM3",
        {Precision.float32: 25.5e12, Precision.tf32: 58.2e12, Precision.bf16: 154.6e12},
        'measured: first-order scores with Stable Diffusion 1.4\'s UNet (benchmarks/RESULTS.md, "On a GPU")',
    ),
    # 5,050 queries of 20,000 candidates x 10 forwards and 4,000 pairs x 2.1, of 803 GFLOP, in 15,150 hours.
    "paper": Device(
        "the paper's GPU",
        {Precision.float32: 15.5e12},
        "worked out of the paper's 15,150 GPU-hours (docs/scale.md)",
    ),
    # 10 timesteps of 2.05 x 0.298 GFLOP in 86.9 ms.
    "cpu2": Device(
        "2 cores (x86_64)",
        {Precision.float32: 70e9},
        "measured: first-order scores with the demo's UNet (benchmarks/RESULTS.md, \"The teachers' cost\")",
    ),
}


def known_speed(name: str, precision: Precision) -> tuple[float, str]:
    """Return FLOP a second of a measured device in a precision, and the source of the figure.

    Raises:
        UsageError: there is no such device, or it was not measured so.
    """
    if name not in DEVICES:
        raise UsageError(f"--device {name}: measured are {', '.join(DEVICES)}; or leave it out on the device itself")
    device = DEVICES[name]
    if precision not in device.flops_per_second:
        measured = ", ".join(device.flops_per_second)
        raise UsageError(f"--device {name} is known in {measured}, and teacher.precision is {precision}: name another")
    return device.flops_per_second[precision], f"{device.title}, {precision}; {device.source}"
