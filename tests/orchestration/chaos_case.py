"""A data set of 63 samples and 8 queries whose curation has 63 to 504 score shards, made by jobs of a work pool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from tests import tiny

SAMPLES, QUERIES = 63, 8
FAULTS = Path(__file__).parent / "faults"


def lay_out(folder: Path, model: Path, *, shards: int, **execution: Any) -> Path:
    """Two tars and a config whose curation has about this many shards; returns the config's path."""
    tiny.write_tar(folder / "data" / "shapes-0.tar", tiny.sample_members(range(40)))
    tiny.write_tar(folder / "data" / "shapes-1.tar", tiny.sample_members(range(40, SAMPLES)))
    config = {
        "name": "chaos",
        "workspace": "workspace",
        "device": "cpu",
        "data": {"shards": "data/*.tar"},
        "model": {"folder": str(model), "micro_batch": 8},
        "queries": {
            "captions": [f"a {color} shape" for color in tiny.COLORS],
            "steps": 3,
            "split": {"train": 4, "validation": 2, "test": 2},
        },
        "features": {"space": "pixel"},
        "curvature": {"samples": 16},
        "candidates": {"policy": "all"},
        "teacher": {
            "name": "abu_plus_first_order",
            "alpha": 1e-4,
            "timesteps": 4,
            "gradient_pairs": 4,
            "shard_samples": 2 if shards > SAMPLES // 2 else max(1, SAMPLES // shards),
            "shard_queries": 1 if shards > SAMPLES else None,
        },
        "self_consistency": None,
        "head": {"epochs": 2},
        "evaluation": {"cutoffs": [5, 10], "validation_cutoff": 10, "neighbors": 4},
        "execution": {"runner": "pool", "pools": [{"slots": 2}], **execution},
    }
    if shards >= 500:
        config["teacher"]["shard_samples"] = 1
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


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
