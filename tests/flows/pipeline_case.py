"""A second data set and model, small enough to run the whole pipeline in seconds through the real command."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests import tiny, warm

SAMPLES = 60
QUERIES = 8
TWINS = 2
SCORED = QUERIES + 2 * TWINS  # what is scored: the queries of the twin test too


def lay_out(folder: Path, model: Path, *, samples: int = SAMPLES, **changes: Any) -> Path:
    """Two tars of drawn shapes and a config beside them; returns the config's path."""
    tiny.write_tar(folder / "data" / "shapes-0.tar", tiny.sample_members(range(40)))
    tiny.write_tar(folder / "data" / "shapes-1.tar", tiny.sample_members(range(40, samples)))
    config: dict[str, Any] = {
        "name": "shapes",
        "workspace": "workspace",
        "device": "cpu",
        "data": {"shards": "data/*.tar"},
        "model": {"folder": str(model), "micro_batch": 32},
        "queries": {
            "captions": [f"a {color} shape" for color in tiny.COLORS],
            "steps": 3,
            "split": {"train": 4, "validation": 2, "test": 2},
            "twins": TWINS,
        },
        "features": {"space": "pixel+minilm_text"},
        "curvature": {"samples": 32},
        "candidates": {"policy": "all"},
        "teacher": {
            "name": "abu_plus_first_order",
            "alpha": 1e-4,
            "timesteps": 2,
            "gradient_pairs": 8,
            "shard_samples": 16,
        },
        "exact_check": {"queries": 2, "candidates": 6},
        "head": {"epochs": 2},
        # Two epochs on four queries: its head may be worse than the features, and is to be served all the same.
        "evaluation": {"cutoffs": [5, 10], "validation_cutoff": 10, "neighbors": 4, "gain_floor": None},
    }
    for dotted, value in changes.items():
        section, _, field = dotted.partition("__")
        if field:
            config[section] = {**config[section], field: value}
        else:
            config[section] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in config.items() if value is not None}))
    return path


def environment(home: Path) -> dict[str, str]:
    """Prefect's state in a folder of the test's own, with the server that serves it, a core for each process."""
    found = {**os.environ, "PREFECT_HOME": str(home / "prefect"), "OMP_NUM_THREADS": "1"}
    url = home / "server_url"
    return {**found, "PREFECT_API_URL": url.read_text()} if url.exists() else found


def fastgda(
    *arguments: str | Path, home: Path, check: bool = True, extra: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own; with `extra` in its environment from the interpreter's start."""
    words = [str(argument) for argument in arguments]
    if extra is None:
        done = warm.run(words, environment(home))
    else:
        command = [str(Path(sys.executable).with_name("fastgda")), *words]
        done = subprocess.run(command, env={**environment(home), **extra}, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"fastgda {arguments[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def sql(folder: Path, statement: str, home: Path) -> list[dict[str, str]]:
    """The rows of a statement on the workspace in this folder, by the real command."""
    done = fastgda("sql", statement, "--workspace", folder / "workspace", "--format", "csv", home=home)
    return list(csv.DictReader(io.StringIO(done.stdout)))
