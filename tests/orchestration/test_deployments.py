"""`prefect deploy --all` on a real server: a schedule, triggers that chain four deployments, alerts by webhook."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from storage_schemas.commit import manifest_path
from storage_schemas.snapshots.published import read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests import tiny
from tests.orchestration.chaos_case import lay_out
from tests.prefect_processes import ROOT, Prefect, ask, prefect_server
from tests.storage_schemas.postgres import postgres_server, prefect_url

CHAIN = ("curate partition", "curate", "make parts", "train rank head", "rebuild index", "evaluate", "alert")
TODAY = datetime.now(UTC).date()
DAYS = [(TODAY - timedelta(days=back)).isoformat() for back in (1, 0)]


@pytest.fixture(scope="module")
def mailbox() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """URL of a webhook on loopback, and what was sent to it."""
    received: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"json://127.0.0.1:{server.server_port}/alerts", received
    server.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Queries that come in partitions, and a floor that no head of two epochs can pass."""
    folder = tmp_path_factory.mktemp("user")
    path = lay_out(folder, model_folder, shards=4, forwards_per_second=50)
    for name, numbers in zip(DAYS, (range(100, 108), range(108, 116)), strict=True):
        members = [(f"{name}-{member}", content) for member, content in tiny.sample_members(numbers)]
        tiny.write_tar(folder / "generated" / name / "0.tar", members)
    config = yaml.safe_load(path.read_text())
    config["queries"] = {
        "shards": "generated/{partition}/*.tar",
        "twins": 0,
        "split": {"validation_share": 0.2, "test_share": 0.2},
    }
    config["evaluation"]["floor"] = 0.99
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, config: Path, mailbox: tuple[str, list[dict[str, str]]]
) -> Iterator[Prefect]:
    """A server with everything deployed, a worker for coordinators and one for jobs.

    Its database is the documented one for more than one machine: on a loaded machine SQLite is locked for minutes.
    """
    with (
        postgres_server() as postgres,
        prefect_server(tmp_path_factory.mktemp("server"), database=prefect_url(postgres)) as found,
    ):
        found.deploy(config)
        found.start_worker("coordinators", "fastgda", extra={"FASTGDA_ALERT_URLS": mailbox[0]}, limit=3)
        found.start_worker("gpu", "fastgda-gpu")
        yield found


def flow_runs(server: Prefect) -> list[tuple[str, str, str]]:
    """(flow, name, state) of every run."""
    flows = {flow["id"]: flow["name"] for flow in ask(server.url, "flows/filter")}
    found = ask(server.url, "flow_runs/filter")
    return [(flows[run["flow_id"]], run["name"], run["state"]["name"]) for run in found]


def check_forms(server: Prefect, config: Path) -> None:
    """What stands in `prefect.yaml` is deployed, with the forms of its configuration."""
    found = ask(server.url, "deployments/filter")
    declared = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    assert {deployment["name"] for deployment in found} == {deployment["name"] for deployment in declared}
    by_name = {deployment["name"]: deployment for deployment in found}
    curate = by_name["curate"]
    assert curate["parameters"]["config"]["workspace"] == str(config.parent / "workspace")
    schema = curate["parameter_openapi_schema"]["definitions"]
    assert schema["TeacherConfig"]["properties"]["alpha"]["description"].startswith("step size")
    assert schema["ExecutionConfig"]["properties"]["runner"]["enum"] == ["local", "ray", "dask", "pool", "slurm"]
    assert not curate["pull_steps"], (
        "the code is installed where workers run, not fetched from a folder of this machine"
    )
    (schedule,) = by_name["nightly"]["schedules"]
    assert schedule["schedule"]["cron"] == "30 2 * * *" and schedule["active"]
    automations = ask(server.url, "automations/filter")
    expected = {word for automation in automations for word in automation["trigger"].get("expect", [])}
    assert {
        "fastgda.scores.published",
        "fastgda.head.trained",
        "fastgda.index.built",
        "fastgda.run.incomplete",
    } <= expected


def test_everything_is_deployed_and_a_scheduled_curation_starts_the_rest_by_events(
    server: Prefect, config: Path, mailbox: tuple[str, list[dict[str, str]]]
) -> None:
    check_forms(server, config)
    start = datetime.now(UTC) + timedelta(seconds=15)
    server.prefect(
        *("deployment", "schedule", "create", "curate partition/nightly"),
        *("--interval", "86400", "--anchor-date", start.isoformat()),
    )
    deadline = time.monotonic() + 700
    while {flow for flow, _, state in flow_runs(server) if state == "Completed"} != set(CHAIN):
        failed = [run for run in flow_runs(server) if run[2] in ("Failed", "Crashed")]
        assert not failed, f"{failed}\n{server.log('coordinators')}\n{server.log('gpu')}"
        assert time.monotonic() < deadline, f"{flow_runs(server)}\n{server.log('coordinators')}"
        time.sleep(1)
    names = {name for _, name, _ in flow_runs(server)}
    yesterday = (start.date() - timedelta(days=1)).isoformat()
    assert f"curate chaos abu_plus_first_order {yesterday} {start:%Y-%m-%d}" in names
    workspace = Workspace(config.parent / "workspace")
    published = read_published(workspace)
    assert published.index is None, "the index is below the floor"
    rows = query(workspace.root, "SELECT count(DISTINCT query_id) AS q, count(*) AS n FROM scores").to_pylist()
    assert rows == [{"q": 8, "n": 8 * 63}]
    deadline = time.monotonic() + 60
    while not mailbox[1]:
        assert time.monotonic() < deadline, server.log("coordinators")
        time.sleep(0.5)
    assert "fastgda.promotion.refused" in mailbox[1][0]["title"]
    assert "below evaluation.floor 0.99" in mailbox[1][0]["message"]
    artifacts = ask(server.url, "artifacts/latest/filter")
    kinds = {artifact["key"].split("-")[0]: artifact for artifact in artifacts}
    assert {"progress", "top", "published", "loss", "head", "index", "map"} <= kinds.keys()
    assert kinds["top"]["data"].startswith("data:image/jpeg;base64,")
    assert "100.0%" in kinds["progress"]["data"]


@pytest.mark.slow
def test_a_backfill_adds_another_day_beside_the_first(server: Prefect, config: Path) -> None:
    server.prefect(
        *("deployment", "run", "backfill/backfill", "--params", json.dumps({"partitions": DAYS})),
        "--watch",
    )
    workspace = Workspace(config.parent / "workspace")
    rows = query(workspace.root, "SELECT count(DISTINCT query_id) AS q FROM scores").to_pylist()
    assert rows == [{"q": 16}]


@pytest.mark.slow
def test_a_run_that_failed_is_retried_from_the_server(server: Prefect, config: Path) -> None:
    workspace = Workspace(config.parent / "workspace")
    run = read_published(workspace).run
    shard = workspace.score_shard(run, 1)
    shard.unlink()
    manifest_path(shard).unlink()
    server.prefect(
        *("deployment", "run", "retry/retry", "--params", json.dumps({"workspace": str(workspace.root), "run": run})),
        "--watch",
    )
    assert shard.exists()
