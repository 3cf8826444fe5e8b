"""Measure the main job: `fastgda demo` in an empty folder, then once more; prints a Markdown table.

Run: python benchmarks/demo.py
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from storage_schemas.views import query

GAIN = """
SELECT max(value) FILTER (space = 'tuned') AS tuned, max(value) FILTER (space = 'untuned') AS untuned,
    max(value) FILTER (space = 'teacher with other noise') AS teacher
FROM metrics WHERE metric = 'mAP' AND query_id = '' AND cutoff = 100
"""


def timed_demo(folder: Path) -> tuple[float, str]:
    """Wall seconds of the command, and what it printed."""
    command = [str(Path(sys.executable).with_name("fastgda")), "demo", "--folder", str(folder)]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.monotonic() - started, done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "demo"
        first, printed = timed_demo(folder)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        again, _ = timed_demo(folder)
        gain = query(folder / "workspace", GAIN).to_pylist()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "kronfluence", "prefect", "duckdb"))
    print(printed)
    print(f"{os.cpu_count()} cores ({platform.machine()}), no GPU, Python {platform.python_version()}, {packages}\n")
    print("| | measured | at most |\n| --- | ---: | ---: |")
    print(f"| first run | {first:.0f} s | 360 s |")
    print(f"| second run, everything reused | {again:.1f} s | 20 s |")
    print(f"| peak memory of the largest process | {peak:.2f} GB | 4 GB |\n")
    print("| mAP(100) on the test queries | |\n| --- | ---: |")
    print(f"| untuned features | {gain['untuned']:.3f} |\n| tuned features | {gain['tuned']:.3f} |")
    print(f"| ratio | {gain['tuned'] / gain['untuned']:.2f} |")
    print(f"| the teacher itself, under other noise | {gain['teacher']:.3f} |")


if __name__ == "__main__":
    main()
