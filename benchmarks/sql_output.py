"""All scores of a workspace written by `fastgda sql`, beside DuckDB's own COPY of the same view; a Markdown table.

Each file is written in a process of its own, which reports its peak memory and the seconds that its cores worked.
COPY uses every core and may write where it likes, which a person's SQL may not; it keeps the rows' order here, as
`fastgda sql` does.

Run: python benchmarks/sql_output.py
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from score_store import commit, rank

from storage_schemas.database import literal, new_connection
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace

STATEMENT = "SELECT * FROM scores"
COPY_OPTIONS = {
    "csv": "FORMAT csv, HEADER",
    "json": "FORMAT json, ARRAY",
    "parquet": "FORMAT parquet, COMPRESSION zstd",
}


def by_command(root: Path, output: Path, format: str) -> None:
    from flows.commands.main import app

    options = ["--workspace", str(root), "--format", format, "--output", str(output)]
    app(["sql", STATEMENT, *options], standalone_mode=False)


def by_copy(root: Path, output: Path, format: str) -> None:
    workspace = Workspace(root)
    parts = read_snapshot(workspace, read_published(workspace).snapshot).parts
    files = ", ".join(literal(str(workspace.file(part.path))) for part in parts)
    rows = f"SELECT query_id, train_id, score FROM read_parquet([{files}])"
    new_connection(workspace).execute(f"COPY ({rows}) TO {literal(str(output))} ({COPY_OPTIONS[format]})")


WORKS: dict[str, Callable[[Path, Path, str], None]] = {"command": by_command, "copy": by_copy}


def alone(work: str, root: Path, output: Path, format: str) -> tuple[float, float, float]:
    """Seconds, seconds of all cores together, and peak gigabytes of a work in a process of its own."""
    command = [sys.executable, __file__, "--workspace", str(root), "--work", work, "--output", str(output)]
    done = subprocess.run([*command, "--format", format], stdout=subprocess.PIPE, text=True, check=True)
    seconds, cores, gigabytes = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), float(cores), float(gigabytes)


def measure(work: str, root: Path, output: Path, format: str) -> None:
    started = time.perf_counter()
    WORKS[work](root, output, format)
    seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--workspace", type=Path, help="one that is there; a temporary one is made unless given")
    for hidden in ("--work", "--format", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        measure(given.work, given.workspace, Path(given.output), given.format)
        return
    with tempfile.TemporaryDirectory(dir=given.workspace and given.workspace.parent) as scratch:
        root = given.workspace or Path(scratch) / "workspace"
        if given.workspace is None:
            commit(Workspace(root), given.queries, given.candidates)
            rank(Workspace(root), given.queries, given.candidates)
        rows = read_snapshot(Workspace(root), read_published(Workspace(root)).snapshot).rows
        print(f"2 cores ({platform.machine()}), Python {platform.python_version()}, ", end="")
        print(", ".join(f"{name} {version(name)}" for name in ("duckdb", "pyarrow")) + f"; {rows:,} rows\n")
        print("| format | GB | M rows/s | core seconds | peak GB | COPY, M rows/s | core seconds | peak GB |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for format in COPY_OPTIONS:
            cells = []
            for work in WORKS:
                output = Path(scratch) / f"scores.{format}"
                seconds, cores, gigabytes = alone(work, root, output, format)
                cells.append(f"{rows / seconds / 1e6:.2f} | {cores:.0f} | {gigabytes:.2f}")
                size = output.stat().st_size / 1e9
                output.unlink()
                cells[0] = cells[0] if work == "copy" else f"{size:.2f} | {cells[0]}"
            print(f"| {format} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
