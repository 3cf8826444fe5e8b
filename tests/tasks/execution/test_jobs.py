"""Jobs of a work pool, against a real Prefect server, and against servers that are away or refuse."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending

from fastgda_core.errors import UsageError
from storage_schemas.runs.liveness import Beat, write_beat
from storage_schemas.workspace import Workspace
from tasks import logs
from tasks.config.execution import ExecutionConfig
from tasks.execution import jobs
from tasks.execution.fan_out import WorkOrder
from tasks.execution.jobs import JobPool
from tasks.execution.outcomes import Outcome
from tasks.watching.artifacts import publish_markdown
from tests.prefect_processes import free_port

POOLS = ("h100", "a10")


@dataclass
class Answers:
    """An HTTP server's answers: what each request gets, and what was asked."""

    status: int
    body: dict[str, str]
    times: int = 10**9  # after which it finds nothing, as a server without flow runs
    asked: list[str] = field(default_factory=list)

    def __call__(self, _method: str, path: str, _content: bytes) -> tuple[int, bytes]:
        if "csrf" in path:
            return 422, b'{"detail": "CSRF protection is disabled."}'
        self.asked.append(path)
        return (self.status, json.dumps(self.body).encode()) if len(self.asked) <= self.times else (200, b"[]")


@contextmanager
def server(answer: Callable[[str, str, bytes], tuple[int, bytes]]) -> Iterator[str]:
    """The API address of a real HTTP server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = answer(self.command, self.path, asked)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}/api"
        finally:
            listening.shutdown()
            thread.join()


@contextmanager
def asking(url: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: url}):
        yield


def job_pool(folder: Path, run: str = "run", *, missing: list[int] | None = None, **execution: object) -> JobPool:
    order = WorkOrder("here", run, "key", "scores", ExecutionConfig.model_validate({"runner": "pool", **execution}))
    return JobPool(Workspace(folder), order, lambda: 1.0, lambda: missing or [])


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.05)
    logs.set_up("warning", "text")


@pytest.mark.parametrize("status", [401, 403, 409, 422])
def test_what_a_server_refuses_is_said_and_not_waited_for(tmp_path: Path, status: int) -> None:
    answers = Answers(status, {"detail": "the key is of another workspace"}, times=3)
    with server(answers) as url, asking(url), pytest.raises(UsageError) as caught:
        job_pool(tmp_path).make([], lambda: True)
    (line,) = str(caught.value).splitlines()
    assert "the key is of another workspace" in line and str(status) in line and url in line
    assert "PREFECT_API_KEY" in line or status not in (401, 403)


@pytest.mark.parametrize("status", [500, 429, None])
def test_a_server_that_is_away_is_waited_for_as_long_as_nobody_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int | None
) -> None:
    ticks = iter([True, True, False])
    nobody = f"http://127.0.0.1:{free_port()}/api"
    with server(Answers(status or 0, {"detail": "overloaded"})) as url, asking(url if status else nobody):
        outcome = job_pool(tmp_path).make([0, 1], lambda: next(ticks))
    assert outcome.stopped and not outcome.failures
    told = capsys.readouterr().err.replace("\n", " ")
    assert told.count("waiting:") == 1 and "Prefect server" in told


def test_an_artifact_that_a_server_refuses_is_told_of_once_and_stops_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid4()))
    with server(Answers(413, {"detail": "too large for the proxy"})) as url, asking(url):
        assert publish_markdown("progress", "text", "a run's progress") is None
        assert publish_markdown("progress", "text", "a run's progress") is None
    told = capsys.readouterr().err
    assert told.count("too large for the proxy") == 1 and "keep the artifact progress" in told


@dataclass
class Deployed:
    """A real server with the deployments of two pools, which no worker serves."""

    url: str
    client: SyncPrefectClient
    deployments: dict[str, UUID]

    def start(self, deployment: str, run: str, numbers: str, queue: str | None = None) -> FlowRun:
        return self.client.create_flow_run_from_deployment(
            self.deployments[deployment],
            parameters={"numbers": numbers},
            tags=["fastgda", f"run:{run}", "kind:scores"],
            work_queue_name=queue,
        )

    def start_many(self, deployment: str, run: str, numbers: range) -> set[UUID]:
        """A job for each of these numbers."""
        tags = ["fastgda", f"run:{run}", "kind:scores"]
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()  # till then the server leaves them alone
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": tomorrow}}
        path = f"/deployments/{self.deployments[deployment]}/create_flow_run/bulk"
        started: set[UUID] = set()
        waiting = [{"parameters": {"numbers": str(number)}, "tags": tags, "state": state} for number in numbers]
        deadline = time.monotonic() + 60
        while waiting:
            results = self.client._client.post(path, json=waiting[:100]).json()["results"]
            if all(made["status"] == "CREATED" for made in results):
                started |= {UUID(made["flow_run_id"]) for made in results}
                del waiting[:100]
            else:  # all or nothing: SQLite lets one write at a time
                assert time.monotonic() < deadline, results[0]
        return started

    def of_run(self, run: str) -> list[FlowRun]:
        chosen = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"run:{run}"]))
        return self.client.read_flow_runs(flow_run_filter=chosen)


@pytest.fixture(scope="module")
def deployed(home: Path) -> Iterator[Deployed]:
    url = (home / "server_url").read_text()
    with asking(url), get_client(sync_client=True) as client:
        name = f"parts-{uuid4().hex[:6]}"
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        flow = client.create_flow_from_name(name)
        deployments = {
            f"{name}/{each}": client.create_deployment(flow, each, work_pool_name=name, enforce_parameter_schema=False)
            for each in ("h100", "a10")
        }
        yield Deployed(url, client, deployments)


def pools(deployed: Deployed) -> tuple[str, str]:
    h100, a10 = deployed.deployments
    return h100, a10


def test_more_jobs_than_one_answer_holds_are_all_taken_over_and_kept(tmp_path: Path, deployed: Deployed) -> None:
    h100, _ = pools(deployed)
    started = deployed.start_many(h100, "many", range(205))
    pool = job_pool(tmp_path, "many", missing=list(range(205)), pools=[{"deployment": h100, "slots": 205}])
    assert pool._adopt(deployed.client)
    assert {job.flow_run for job in pool._jobs} == started
    assert list(pool._ended(deployed.client, stopping=False)) == [], "none has ended"
    assert sorted(number for job in pool._jobs for number in job.numbers) == list(range(205))


def test_a_job_that_the_server_does_not_show_is_given_up_only_when_it_is_silent(
    tmp_path: Path, deployed: Deployed
) -> None:
    h100, _ = pools(deployed)
    gone = deployed.start(h100, "gone", "0")
    pool = job_pool(tmp_path, "gone", missing=[0], pools=[{"deployment": h100}], lost_after=1000)
    assert pool._adopt(deployed.client)
    deployed.client.delete_flow_run(gone.id)
    assert list(pool._ended(deployed.client, stopping=False)) == []
    (job,) = pool._jobs
    job.beat_changed -= 1001
    write_beat(pool.workspace, "gone", Beat(worker="host:1", beat=1, at=datetime.now(UTC), job=str(gone.id)))
    assert list(pool._ended(deployed.client, stopping=False)) == [], "its worker tells that it lives"
    job.beat_changed -= 1001
    assert list(pool._ended(deployed.client, stopping=False)) == [job] and pool._jobs == []


def test_a_job_whose_worker_died_before_it_started_it_is_given_up(
    tmp_path: Path, deployed: Deployed, capsys: pytest.CaptureFixture[str]
) -> None:
    h100, _ = pools(deployed)
    started = deployed.start(h100, "stuck", "0-3")
    pool = job_pool(tmp_path, "stuck", missing=[0, 1, 2, 3], pools=[{"deployment": h100}], start_within=1000)
    assert pool._adopt(deployed.client)
    (job,) = pool._jobs
    job.created -= 2000
    assert list(pool._ended(deployed.client, stopping=False)) == [], "no worker has taken it, which is no failure"
    deployed.client.set_flow_run_state(started.id, Pending())
    assert list(pool._ended(deployed.client, stopping=False)) == [], "an image is pulled"
    assert job.taken is not None
    job.taken -= 1001
    assert list(pool._ended(deployed.client, stopping=False)) == [job] and pool._jobs == []
    assert pool._settle(job, Outcome()) == [0, 1, 2, 3]
    told = capsys.readouterr().err
    assert told.count("no worker has taken") == 1 and "did not start it within 1000 s" in told
    (flow_run,) = deployed.of_run("stuck")
    assert flow_run.state is not None and flow_run.state.is_crashed()


def test_jobs_that_are_taken_over_count_against_the_pool_that_they_are_of(tmp_path: Path, deployed: Deployed) -> None:
    h100, a10 = pools(deployed)
    deployed.start(a10, "two-pools", "0-3")
    deployed.start(h100, "two-pools", "4", queue="urgent")
    deployed.start(h100, "two-pools", "5")
    several = ({"deployment": h100}, {"deployment": a10}, {"deployment": h100, "queue": "urgent"})
    pool = job_pool(tmp_path, "two-pools", pools=several)
    assert pool._adopt(deployed.client)
    found = {job.numbers[0]: (job.pool.deployment, job.pool.queue) for job in pool._jobs}
    assert found == {0: (a10, None), 4: (h100, "urgent"), 5: (h100, None)}


def test_a_lost_answer_starts_no_job_twice(tmp_path: Path, deployed: Deployed) -> None:
    h100, _ = pools(deployed)
    lost = iter([True, True, True, False])

    def forwarded(method: str, path: str, content: bytes) -> tuple[int, bytes]:
        there = urlsplit(deployed.url)
        connection = http.client.HTTPConnection(there.hostname or "", there.port or 0)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        status, body = answer.status, answer.read()
        return (503, b"{}") if path.endswith("create_flow_run") and next(lost, False) else (status, body)

    ticks = iter([True, True, True, True, False])
    pool = job_pool(tmp_path, "lost", missing=[0, 1, 2], pools=[{"deployment": h100}])
    with server(forwarded) as url, asking(url):
        outcome = pool.make([0, 1, 2], lambda: next(ticks, False))
    assert outcome.stopped and next(lost, None) is None
    (flow_run,) = deployed.of_run("lost")
    assert flow_run.parameters["numbers"] == "0-2"
