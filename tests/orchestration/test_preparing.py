"""Tars read and samples encoded by two workers of a pool, one of which is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage_schemas import tables
from storage_schemas.runs.liveness import preparation_names
from storage_schemas.workspace import Workspace
from tasks.config.files import load_config
from tasks.context import Context
from tasks.inputs.features import extract_features, feature_folders
from tasks.inputs.samples import ingest_samples
from tasks.watching.run_status import run_status
from tests import tiny
from tests.flows import pipeline_case
from tests.prefect_processes import BIN, Prefect, marked, prefect_server

pytestmark = pytest.mark.integration
SAMPLES, TARS = 1_100, 4  # two parts of features

# What `plan_run` does first, with parts small enough for a few tars.
COORDINATOR = """
import sys
from pathlib import Path
from prefect import flow
from tasks.config.files import load_config
from tasks.context import Context
from tasks.execution.preparing import make_features, make_samples
from tasks.inputs import sample_parts

sample_parts._ends_a_part = lambda shard, size: True

@flow
def prepare():
    context = Context(load_config(Path(sys.argv[1])), "")
    make_features(context, make_samples(context).artifact)

prepare()
"""


def lay_out(folder: Path, model: Path, runner: str) -> Path:
    config = pipeline_case.lay_out(
        folder,
        model,
        features={"space": "pixel"},
        execution={"runner": runner, "pools": [{"slots": 2}], "lost_after": 10},
    )
    for tar in (folder / "data").glob("*.tar"):
        tar.unlink()
    share = SAMPLES // TARS
    for number in range(TARS):
        members = tiny.sample_members(range(number * share, (number + 1) * share))
        tiny.write_tar(folder / "data" / f"shapes-{number:02d}.tar", [*members, (f"bad{number % 5}.jpg", b"no image")])
    return config


def wait_until(what: Callable[[], object], server: Prefect) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert time.monotonic() < deadline, server.log("coordinator")
        assert server.processes["coordinator"].poll() in (None, 0), server.log("coordinator")
        time.sleep(0.05)


def strike(server: Prefect, name: str) -> None:
    """Kill a worker with the job that it has, as a machine that goes away."""
    wait_until(lambda: jobs_of(server, name), server)
    for pid in jobs_of(server, name):
        os.kill(pid, signal.SIGKILL)
    server.kill(name)


def jobs_of(server: Prefect, name: str) -> list[int]:
    return [pid for word in ("prefect.engine", "prefect.flow_engine") for pid in marked(f"WORKER={name};", word)]


def test_the_tables_are_the_same_where_a_worker_is_killed_over_them(tmp_path: Path, model_folder: Path) -> None:
    config = lay_out(tmp_path / "user", model_folder, "pool")
    workspace = Workspace(tmp_path / "user" / "workspace")
    with prefect_server(tmp_path / "server") as server:
        server.deploy(config, "process")
        for name in ("gpu-1", "gpu-2"):
            server.start_worker(name, "fastgda-gpu", extra={"WORKER": f"{name};"})
        server.start("coordinator", str(BIN / "python"), "-c", COORDINATOR, str(config))
        wait_until(lambda: list(workspace.sample_parts.glob("*.parquet")), server)
        strike(server, "gpu-1")
        server.start_worker("gpu-1", "fastgda-gpu", extra={"WORKER": "gpu-1;"})
        assert server.processes["coordinator"].wait(240) == 0, server.log("coordinator")

    calm = Context(load_config(lay_out(tmp_path / "calm", model_folder, "local")), "")
    samples = ingest_samples.fn(calm).artifact
    extract_features.fn(calm, samples)
    (found,) = workspace.root.glob("samples/*/samples.parquet")
    for name, table in (("samples.parquet", tables.SAMPLES), ("rejected.parquet", tables.REJECTED_SAMPLES)):
        ours, theirs = (tables.read(path.with_name(name), table).to_pylist() for path in (found, samples.path))
        assert ours == [row | {"shard": row["shard"].replace("/calm/", "/user/")} for row in theirs] and ours
    (folder, _), *_ = feature_folders(calm, samples).values()
    ours = tables.read_parts(workspace.root / folder.relative_to(calm.workspace.root), tables.FEATURES)
    assert ours.equals(tables.read_parts(folder, tables.FEATURES)) and ours.num_rows == SAMPLES
    for name in preparation_names(workspace):
        status = run_status(workspace, name)
        assert status.state == "done" and not status.failures
