"""`python -m benchmarks.rehearsal.thin ...` is `fastgda ...` with one encoder more: `thin`, numbers out of captions.

With the similarity teacher it makes a run whose every stage is there and costs next to nothing.
"""

from __future__ import annotations

import zlib
from typing import Any

WIDTH = 16


def register() -> None:
    """Add the encoder to those that are known."""
    from fastgda_core.feature_spaces import SOURCES
    from fastgda_core.features.encoder import Encoder
    from fastgda_core.features.encoders import ENCODERS, Registered

    SOURCES["thin"] = ""
    ENCODERS["thin"] = Registered(lambda _source, _device: Encoder("text", numbers_of), batch=100_000, text=True)


def numbers_of(captions: list[str]) -> Any:
    """Return numbers in -1..1 that are as good as random and the same for equal captions, (n, WIDTH) float32."""
    import numpy as np
    import torch

    words = np.fromiter((zlib.crc32(text.encode()) for text in captions), np.uint64, len(captions))
    # Steele et al., "Fast splittable pseudorandom number generators" (2014): SplitMix64.
    mixed = words[:, None] + np.arange(1, WIDTH + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(40)).astype(np.float32) / 2**23 - 1)


if __name__ == "__main__":
    register()
    from flows.commands.main import main

    main()
