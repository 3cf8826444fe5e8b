"""What orchestration costs: thousands of score shards whose scores take no time.

    python benchmarks/orchestration.py                                5,000 shards, the command's own server
    python benchmarks/orchestration.py --server sqlite                a Prefect server on SQLite
    python benchmarks/orchestration.py --server postgres --shards 50000

The plan, the Prefect task runs, the commits, the ledger and the second execution are the real ones; only the teacher's
arithmetic is left out. Compared with bare Prefect tasks, which do nothing, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from flows.commands.own_server import start_server, wait_for_server
from tasks.config.files import load_config

BARE = 300
QUIET = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
}
SAMPLES = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=5000, help="a multiple of 5,000, or less than that")
    parser.add_argument("--server", choices=["own", "sqlite", "postgres"], default="own")
    parser.add_argument("--phase", choices=["bare", "prepare", "score", "again"], help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        start_server()
        wait_for_server()
        print(json.dumps(PHASES[arguments.phase](arguments.config)))
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        os.environ.update(
            PREFECT_HOME=str(folder / "home"),
            PREFECT_LOGGING_LEVEL="CRITICAL",
            OMP_NUM_THREADS="1",
            DO_NOT_TRACK="1",
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
        )
        server = stack.enter_context(running_server(folder, arguments.server))
        config = lay_out(folder / "user", arguments.shards)
        found = {phase: run_phase(phase, config) for phase in PHASES}
        started = time.monotonic()
        command = [str(Path(sys.executable).with_name("fastgda")), "curate", str(config)]
        subprocess.run(command, check=True, capture_output=True)
        whole = time.monotonic() - started
        score, shards = found["score"], arguments.shards
        rows = {
            "score shards": f"{shards:,}",
            "from the first shard to the last": f"{score['seconds']:.1f} s",
            "per shard": f"{1000 * score['seconds'] / shards:.1f} ms",
            f"one of {BARE} bare Prefect tasks": f"{1000 * found['bare']['seconds']:.1f} ms",
            "memory of the coordinator when the first shard starts": f"{score['before']:,.0f} MB",
            "at most": f"{score['peak']:,.0f} MB",
            "a second `curate`, in a process that has a server": f"{found['again']['seconds']:.1f} s",
            "a second `fastgda curate`, start of the process included": f"{whole:.1f} s",
        }
        if server is not None:
            log = server.log("server")
            rows["`database is locked` in the server's log"] = str(log.count("database is locked"))
        print("| | |\n| --- | ---: |")
        for what, value in rows.items():
            print(f"| {what} | {value} |")


@contextmanager
def running_server(folder: Path, kind: str) -> Iterator[Any]:
    """None where each command has its own."""
    from tests.prefect_processes import prefect_server
    from tests.storage_schemas.postgres import postgres_server

    if kind == "own":
        yield None
        return
    with ExitStack() as stack:
        database = None
        if kind == "postgres":
            parts = dict(part.split("=") for part in stack.enter_context(postgres_server()).split())
            database = f"postgresql+asyncpg://{parts['user']}@{parts['host']}:{parts['port']}/postgres"
        server = stack.enter_context(prefect_server(folder / "server", database=database))
        os.environ["PREFECT_API_URL"] = server.url
        yield server


def run_phase(phase: str, config: Path) -> dict[str, float]:
    """In a process of its own, so that none carries the memory of another."""
    print(f"{phase} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--phase", phase, "--config", str(config)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def bare(_config: Path) -> dict[str, float]:
    from prefect import flow, task

    @task
    def nothing() -> None: ...

    @flow
    def bare_tasks() -> float:
        started = time.monotonic()
        for future in [nothing.submit() for _ in range(BARE)]:
            future.result()
        return (time.monotonic() - started) / BARE

    return {"seconds": bare_tasks()}


def prepare(path: Path) -> dict[str, float]:
    """All that comes before the scores."""
    from prefect import flow

    from flows.curation import plan_run
    from tasks.execution.coordinator import begin_run

    @flow
    def before_scores() -> None:
        coordinator = begin_run(plan_run(load_config(path)))
        for kind in coordinator.before("scores"):
            coordinator.make(kind)

    before_scores()
    return {}


def score(path: Path) -> dict[str, float]:
    """Score and publish, with a teacher whose scores cost nothing."""
    import torch

    from flows.curation import curate
    from tasks.execution.coordinator import Coordinator
    from tasks.teaching.families import BlockScores
    from tasks.teaching.unlearning import Unlearning

    def no_scores(_self: Any, _context: Any, _artifacts: Any, query_numbers: list[int], train_ids: Any) -> BlockScores:
        zeros = torch.zeros(len(query_numbers), len(train_ids), dtype=torch.float64)
        return BlockScores(train_ids, zeros, torch.full_like(zeros, torch.nan), {})

    make = Coordinator.make
    found: dict[str, float] = {}

    def measured(self: Coordinator, kind: str) -> Any:
        if kind != "scores":
            return make(self, kind)
        found["before"], started = memory("VmRSS"), time.monotonic()
        made = make(self, kind)
        found["seconds"], found["peak"] = time.monotonic() - started, memory("VmHWM")
        return made

    assert "scores" in vars(Unlearning), "what would be measured is the teacher"
    Unlearning.scores = no_scores
    Coordinator.make = measured
    curate(load_config(path))
    return found


def again(path: Path) -> dict[str, float]:
    """A run that is finished, once more."""
    from flows.curation import curate

    config = load_config(path)
    started = time.monotonic()
    found = curate(config)
    assert all(made.reused for made in found.made)
    return {"seconds": time.monotonic() - started}


PHASES = {"bare": bare, "prepare": prepare, "score": score, "again": again}


def memory(field: str) -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1000


def lay_out(folder: Path, shards: int) -> Path:
    # Not at the top: a coordinator that makes no models need not hold what makes them.
    import yaml

    from tests import tiny
    from tests.flows import pipeline_case

    model = tiny.save_model(folder / "model")
    samples, blocks = min(SAMPLES, shards), max(1, shards // SAMPLES)
    path = pipeline_case.lay_out(folder, model, exact_check=None, self_consistency=None)
    for tar in (folder / "data").glob("*.tar"):
        tar.unlink()
    tiny.write_tar(folder / "data" / "all.tar", tiny.sample_members(range(samples)))
    config = yaml.safe_load(path.read_text())
    captions = [f"a {color} shape number {number}" for number in range(2) for color in tiny.COLORS]
    queries = max(3, blocks)
    split = {"train": queries - 2, "validation": 1, "test": 1}
    config["queries"] |= {"captions": captions[:queries], "split": split, "twins": 0}
    config["features"]["space"] = "pixel"
    config["candidates"] = {"policy": "all"}
    block = -(-queries // blocks)
    config["teacher"] |= {"shard_samples": 1, "shard_queries": block, "timesteps": 1, "gradient_pairs": 1}
    path.write_text(yaml.safe_dump(config))
    return path


if __name__ == "__main__":
    main()
