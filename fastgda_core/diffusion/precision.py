"""Number formats in which the denoiser runs; a configuration names one without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

from fastgda_core.errors import UsageError

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    """A number format: float64 and float32 in full; tf32 and bf16 round the factors of products, and sum in float32."""

    float64 = "float64"
    float32 = "float32"
    tf32 = "tf32"
    bf16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, latents and caption embeddings."""
        import torch

        return torch.float64 if self is Precision.float64 else torch.float32

    @property
    def exact(self) -> bool:
        """True if a difference of two losses keeps enough digits (design section 4, "First order")."""
        return self in {Precision.float64, Precision.float32}


@contextmanager
def running(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run forwards on `device` in this precision inside the block; their backwards need `multiplying` around them.

    Raises:
        UsageError: tf32 without a CUDA device.
    """
    import torch

    if precision is Precision.tf32 and device.type != "cuda":
        raise UsageError("teacher.precision is tf32, which only CUDA devices have: use float32 or bf16")
    with multiplying(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.bf16):
        yield


@contextmanager
def multiplying(precision: Precision) -> Iterator[None]:
    """Round the factors of float32 products to TF32 inside the block if and only if the precision is tf32.

    float32 has to be set too: torch lets convolutions run in TF32 unless told otherwise.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision is Precision.tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
