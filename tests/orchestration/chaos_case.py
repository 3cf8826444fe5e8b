"""A data set of 63 samples and 8 queries whose curation has 63 to 504 score shards, made by jobs of a work pool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.flows import pipeline_case

SAMPLES, QUERIES = 63, 8
FAULTS = Path(__file__).parent / "faults"


def lay_out(folder: Path, model: Path, *, shards: int, **execution: Any) -> Path:
    """Two tars and a config whose curation has about this many shards; returns the config's path."""
    shape = {"shard_samples": 1, "shard_queries": 1}
    if shards <= SAMPLES:
        shape = {"shard_samples": 2 if shards > SAMPLES // 2 else SAMPLES // shards}
    return pipeline_case.lay_out(
        folder,
        model,
        samples=SAMPLES,
        name="chaos",
        model__micro_batch=8,
        features={"space": "pixel"},
        curvature={"samples": 16},
        teacher={"name": "abu_plus_first_order", "alpha": 1e-4, "timesteps": 4, "gradient_pairs": 4, **shape},
        queries__twins=0,
        exact_check=None,
        self_consistency=None,
        execution={"runner": "pool", "pools": [{"slots": 2}], **execution},
    )


def rot(tar: Path, content: bytes) -> bytes:
    """Damage an image inside a tar as a failing disk does: neither size nor time of the file changes.

    Returns:
        What the tar held before.
    """
    before = tar.read_bytes()
    place = before.index(content) + len(content) // 2
    stat = tar.stat()
    tar.write_bytes(before[:place] + bytes(byte ^ 0xFF for byte in before[place : place + 64]) + before[place + 64 :])
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return before


def mend(tar: Path, content: bytes) -> None:
    """Write a tar's content back, with the time that the file had."""
    stat = tar.stat()
    tar.write_bytes(content)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
