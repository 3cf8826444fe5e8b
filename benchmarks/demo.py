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

from storage_schemas.sql.views import query

PRECISION = "SELECT space, value FROM metrics WHERE metric = 'mAP' AND query_id = '' AND cutoff = 100"
TWINS = "SELECT split, value FROM metrics WHERE metric = '{}' ORDER BY split DESC"
RANKINGS = ("chance", "captions alone", "untuned", "tuned", "sketch", "another teacher")


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
        precision = {row["space"]: row["value"] for row in query(folder / "workspace", PRECISION).to_pylist()}
        shares, worst = (
            query(folder / "workspace", TWINS.format(metric)).to_pylist()
            for metric in ("twin share", "worst twin rank")
        )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "kronfluence", "prefect", "duckdb"))
    print(printed)
    print(f"{os.cpu_count()} cores ({platform.machine()}), no GPU, Python {platform.python_version()}, {packages}\n")
    print("| | measured | at most |\n| --- | ---: | ---: |")
    print(f"| first run | {first:.0f} s | 360 s |")
    print(f"| second run, everything reused | {again:.1f} s | 20 s |")
    print(f"| peak memory of the largest process | {peak:.2f} GB | 4 GB |\n")
    print("| twins | found | worst rank |\n| --- | ---: | ---: |")
    for share, rank in zip(shares, worst, strict=True):
        print(f"| {share['split']} | {share['value']:.0%} | {rank['value']:,.0f} |")
    print("\n| mAP(100) on the test queries | |\n| --- | ---: |")
    for space in RANKINGS:
        print(f"| {space} | {precision[space]:.3f} |")


if __name__ == "__main__":
    main()
