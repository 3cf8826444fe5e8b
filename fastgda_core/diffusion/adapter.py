"""LoRA adapters (Hu et al., 2022) of a denoiser: the files of diffusers and peft, read and laid over its layers.

An adapted layer gives W x + scale B A x. A and B are layers of their own, `<layer>.lora_A` and `<layer>.lora_B`, so
whatever takes gradients of linear and convolutional layers takes them of an adapter too. peft is not needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastgda_core.diffusion.folder import DENOISERS, read_index
from fastgda_core.diffusion.weights import check_header, weight_files
from fastgda_core.errors import UsageError

DIFFUSERS, PEFT, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # where diffusers writes peft's settings into the header of the weights
LARGEST_CONFIG = 2**20  # bytes
DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_SIDES = {"lora_A": "lora_A", "lora_B": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
_NAME = re.compile(r"(?P<layer>.+)\.(?P<side>lora_A|lora_B|lora\.down|lora\.up)\.weight")
# Starts of peft's `init_lora_weights` that change the weights under the adapter too, which are not in its files.
_MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MEND = (
    "give a LoRA of model.folder's denoiser, as save_lora_weights() of diffusers or save_pretrained() of peft writes"
)


@dataclass(frozen=True)
class Pair:
    """The adapter of one layer: the names of A and B in the file, the shape of each, and the scale of B A."""

    down: str
    up: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    scale: float


def check_adapter(adapter: Path, model: Path) -> None:
    """Check that a folder holds a LoRA of a model folder's denoiser; the weights stay unread.

    Raises:
        UsageError: the folder or its weights are missing, damaged, pickled, or of another kind or model.
    """
    part = read_index(model).denoiser_part
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(model / part / "diffusion_pytorch_model.safetensors"):
        check_header(path)
        with safe_open(path, framework="np") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for layer, pair in read_adapter(adapter, part).items():
        if f"{layer}.weight" not in shapes:
            raise _unusable(adapter, f"adapts {layer}, which the model's {part} does not have")
        _check_shapes(adapter, layer, pair, shapes[f"{layer}.weight"])


def read_adapter(adapter: Path, part: str) -> dict[str, Pair]:
    """Read what a LoRA adapts, from the header of its weights and its settings.

    Args:
        adapter: the folder.
        part: what diffusers calls the denoiser's folder, `unet` or `transformer`.

    Returns:
        by the name of the adapted layer.

    Raises:
        UsageError: as `check_adapter`.
    """
    path = _weights(adapter)
    check_header(path)
    with safe_open(path, framework="pt") as file:
        header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        alphas = {
            name: float(file.get_tensor(name)) for name in header if name.endswith(".alpha") and _one(header[name])
        }
        metadata = file.metadata() or {}
    settings = _Settings.of(adapter, path, metadata, part)
    sides: dict[str, dict[str, str]] = {}
    for name, stored in header.items():
        if name in alphas:
            continue
        inner = _inner_name(adapter, name, part)
        match = _NAME.fullmatch(inner)
        if match is None:
            raise _unusable(adapter, f"holds {name}, which is no part of a LoRA that is known here")
        if stored.get_dtype() not in DTYPES:
            raise _unusable(adapter, f"holds {name} as {stored.get_dtype()}, and known are {', '.join(sorted(DTYPES))}")
        sides.setdefault(match["layer"], {})[_SIDES[match["side"]]] = name
    if not sides:
        raise _unusable(adapter, "holds no LoRA weights")
    alphas = {_inner_name(adapter, name, part).removesuffix(".alpha"): alpha for name, alpha in alphas.items()}
    if lost := sorted(alphas.keys() - sides.keys()):
        raise _unusable(adapter, f"has an alpha of {lost[0]} and no weights of it")
    return {
        layer: _pair(adapter, layer, names, {name: tuple(header[name].get_shape()) for name in names.values()},
                     settings, alphas.get(layer))
        for layer, names in sorted(sides.items())
    }  # fmt: skip


def adapter_hash(adapter: Path) -> str:
    """Return a sha256 over the names and contents of an adapter's files, wherever the folder lies."""
    digest = hashlib.sha256()
    weights = _weights(adapter)
    for path in (weights, adapter / PEFT_CONFIG):
        if path == weights or (path.is_file() and weights.name == PEFT):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class AdaptedLinear(nn.Linear):
    """A linear layer with a LoRA over it; its own weights keep their names."""

    lora_A: nn.Linear  # noqa: N815
    lora_B: nn.Linear  # noqa: N815

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        for name, matrix in (("lora_A", down), ("lora_B", up)):
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(matrix.clone(), requires_grad=False)
            self.add_module(name, layer)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * self.lora_B(self.lora_A(input))


class AdaptedConv2d(nn.Conv2d):
    """A convolution with a LoRA over it: A has the kernel, B is 1 x 1."""

    lora_A: nn.Conv2d  # noqa: N815
    lora_B: nn.Conv2d  # noqa: N815

    def __init__(self, base: nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> None:
        place: dict[str, Any] = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        channels = base.in_channels, base.out_channels
        super().__init__(*channels, base.kernel_size, **place, bias=base.bias is not None, device="meta")  # type: ignore[arg-type]
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        rank = len(down)
        self.lora_A = nn.Conv2d(channels[0], rank, base.kernel_size, **place, bias=False, device="meta")  # type: ignore[arg-type]
        self.lora_B = nn.Conv2d(rank, channels[1], 1, bias=False, device="meta")
        for layer, kernel in ((self.lora_A, down), (self.lora_B, up)):
            layer.weight = nn.Parameter(kernel.clone(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * self.lora_B(self.lora_A(input))


@torch.no_grad()
def add_adapter(denoiser: nn.Module, adapter: Path, part: str) -> None:
    """Lay a LoRA over a denoiser's layers, in the denoiser's precision.

    A pair whose B is all zeros, as before the first step of a training, changes nothing and is left out: its A has no
    gradient that a Fisher could be made of.

    Raises:
        UsageError: the adapter does not fit, was never trained, or holds a number that is none.
    """
    pairs, trained = read_adapter(adapter, part), 0
    with safe_open(_weights(adapter), framework="pt") as file:
        for name, pair in pairs.items():
            try:
                base = denoiser.get_submodule(name)
            except AttributeError:
                raise _unusable(adapter, f"adapts {name}, which the model's {part} does not have") from None
            if type(base) not in (nn.Linear, nn.Conv2d) or getattr(base, "groups", 1) != 1:
                raise _unusable(
                    adapter, f"adapts {name}, a {type(base).__name__}: known are linear layers, convolutions"
                )
            assert isinstance(base, nn.Linear | nn.Conv2d)
            _check_shapes(adapter, name, pair, tuple(base.weight.shape))
            down, up = (file.get_tensor(each).to(base.weight) for each in (pair.down, pair.up))
            if not (down.isfinite().all() and up.isfinite().all()):
                raise _unusable(adapter, f"has numbers at {name} that are not finite")
            if not up.any():
                continue
            kind = AdaptedConv2d if isinstance(base, nn.Conv2d) else AdaptedLinear
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, kind(base, down, up, pair.scale))  # type: ignore[arg-type]
            trained += 1
    if not trained:
        raise _unusable(adapter, "was never trained: every lora_B is zero")


@dataclass(frozen=True)
class _Settings:
    """What peft calls LoraConfig, as far as it is known here; None: the file tells no settings, and scales are 1."""

    document: Mapping[str, Any] | None

    @classmethod
    def of(cls, adapter: Path, weights: Path, metadata: Mapping[str, str], part: str) -> _Settings:
        if weights.name == PEFT:
            config = adapter / PEFT_CONFIG
            if not config.is_file() or config.stat().st_size > LARGEST_CONFIG:
                raise _unusable(adapter, f"has no {PEFT_CONFIG} of at most a megabyte, which tells the adapter's scale")
            found = cls(_document(adapter, config.name, config.read_bytes()))
        elif METADATA in metadata:
            told = _document(adapter, METADATA, metadata[METADATA].encode())
            found = cls({name.removeprefix(f"{part}."): value for name, value in told.items()})
        else:
            return cls(None)
        found.check(adapter)
        return found

    def check(self, adapter: Path) -> None:
        """Raise UsageError where a setting makes of the adapter something other than W + scale B A."""
        told = self.document or {}
        if (kind := told.get("peft_type") or "LORA") != "LORA":
            raise _unusable(adapter, f"is of peft's kind {kind}, and known is LORA")
        for name in ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication"):
            if told.get(name):
                raise _unusable(adapter, f"has {name}, which is not known here")
        if (bias := told.get("bias") or "none") != "none":
            raise _unusable(adapter, f"has bias {bias!r}, and known is none")
        if str(told.get("init_lora_weights")).lower().startswith(_MOVING_STARTS):
            raise _unusable(adapter, f"began as {told['init_lora_weights']}, which changes the model's own weights")
        patterns = told.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in patterns):
            raise _unusable(adapter, "has an alpha_pattern with other than plain names of layers")
        for alpha in (told.get("lora_alpha", 1), *patterns.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                raise _unusable(adapter, f"has the lora_alpha {alpha!r:.40}, which is no number")

    def scale(self, layer: str, rank: int) -> float:
        """Return alpha / r of a layer, or alpha / sqrt(r) where it is rank-stabilised (Kalajdzievski, 2023)."""
        if self.document is None:
            return 1.0
        patterns = self.document.get("alpha_pattern") or {}
        named = next((name for name in patterns if f".{layer}".endswith(f".{name.lstrip('.')}")), None)
        alpha = self.document.get("lora_alpha", rank) if named is None else patterns[named]
        return alpha / (math.sqrt(rank) if self.document.get("use_rslora") else rank)


def _document(adapter: Path, name: str, text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unusable(adapter, f"has a {name} that is no JSON ({error})") from error
    if not isinstance(document, dict):
        raise _unusable(adapter, f"has a {name} that is no JSON object")
    return document


def _weights(adapter: Path) -> Path:
    """Return the file of an adapter's weights."""
    if not adapter.is_dir():
        raise _unusable(adapter, "is no folder")
    there = [adapter / name for name in (DIFFUSERS, PEFT) if (adapter / name).is_file()]
    if len(there) == 1:
        return there[0]
    if there:
        raise _unusable(adapter, f"has both {DIFFUSERS} and {PEFT}: remove one")
    if pickled := [path.name for path in sorted(adapter.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]:
        raise _unusable(adapter, f"has its weights in a pickle ({pickled[0]}), which is never opened here")
    raise _unusable(adapter, f"lacks {DIFFUSERS} or {PEFT}")


def _inner_name(adapter: Path, name: str, part: str) -> str:
    """Return a weight's name as seen from the denoiser.

    Raises:
        UsageError: the weight is of another part of the model, or named as another tool names them.
    """
    first, _, rest = name.partition(".")
    if first.startswith("text_encoder"):
        raise _unusable(adapter, f"adapts {first} too, and known are adapters of the denoiser alone")
    if first.startswith(("lora_unet_", "lora_te", "lora_transformer_")):
        raise _unusable(
            adapter, f"has names as kohya's scripts give them ({first:.60}): load and save it with diffusers"
        )
    if first in DENOISERS and first != part:
        raise _unusable(adapter, f"is of a {first}, and the model has a {part}")
    return rest if first == part else name.removeprefix("base_model.model.")


def _one(stored: Any) -> bool:
    return math.prod(stored.get_shape()) == 1


def _pair(
    adapter: Path,
    layer: str,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    settings: _Settings,
    alpha: float | None,
) -> Pair:
    if missing := {"lora_A", "lora_B"} - names.keys():
        raise _unusable(adapter, f"lacks {min(missing)} of {layer}")
    down, up = shapes[names["lora_A"]], shapes[names["lora_B"]]
    rank = down[0] if down else 0
    if not rank:
        raise _unusable(adapter, f"has a lora_A of {layer} without rows")
    scale = settings.scale(layer, rank) if alpha is None else alpha / rank
    if not math.isfinite(scale) or scale == 0:
        raise _unusable(adapter, f"has the scale {scale} at {layer}")
    return Pair(names["lora_A"], names["lora_B"], (down, up), scale)


def _check_shapes(adapter: Path, layer: str, pair: Pair, base: tuple[int, ...]) -> None:
    """Raise UsageError where A and B do not fit a layer's weight, (d_out, d_in) or (d_out, d_in, k, k)."""
    rank = pair.shapes[0][0]
    fitting = ((rank, *base[1:]), (base[0], rank, *(1 for _ in base[2:])))
    if len(base) not in (2, 4) or pair.shapes != fitting:
        told = f"lora_A {list(pair.shapes[0])}, lora_B {list(pair.shapes[1])}"
        raise _unusable(adapter, f"does not fit {layer}: {told} over a weight {list(base)}")
    if rank > max(base[0], math.prod(base[1:])):
        raise _unusable(adapter, f"has rank {rank} at {layer}, more than the layer is wide")


def _unusable(adapter: Path, why: str) -> UsageError:
    return UsageError(f"model.adapter {adapter} {why}: {_MEND}")
