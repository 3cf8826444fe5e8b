"""Questions of tier exact: jobs with progress, whose answers are the teacher's, and which can be called off."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fastgda_core.errors import UsageError
from fastgda_core.interruption import checkpoint
from tasks.serving.answers import Agreement, Answer, Versions
from tasks.serving.attributor import Attributor
from tasks.serving.http.jobs import Jobs
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.problems import Problem
from tasks.serving.http.settings import Limits
from tests.tasks.serving.http.conftest import serving, settings_of
from tests.tasks.whole_runs import WholeRun

ANSWER = Answer("exact", [], [], [], Agreement("x", None, None, "t"), Versions(1, "r", "s", None, None), "l", 0.0)
WAIT = 60.0


def until(look: Callable[[], Any]) -> Any:
    end = time.monotonic() + WAIT
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@pytest.mark.heavy
def test_a_question_to_the_teacher_is_a_job_with_its_answer(unlearned: WholeRun) -> None:
    expected = Attributor(unlearned.workspace).attribute_query("s0001", 4, "exact")
    with serving(settings_of(unlearned)) as client:
        begun = client.post("/v1/attribute", json={"query_id": "s0001", "k": 4, "tier": "exact", "around": 0})
        assert begun.status_code == 202, begun.text
        place = begun.headers["location"]
        assert place == f"/v1/jobs/{begun.json()['job']}"
        done = until(lambda: (told := client.get(place).json())["state"] == "done" and told)
        assert done["progress"] == 1.0
        assert [hit["train_id"] for hit in done["answer"]["hits"]] == [hit.train_id for hit in expected.hits]
        assert [hit["score"] for hit in done["answer"]["hits"]] == pytest.approx([hit.score for hit in expected.hits])
        assert client.get("/v1/jobs/nothing").status_code == 404
        assert client.get(f"/v1/jobs/{'0' * 32}").status_code == 404


@pytest.mark.heavy
def test_sketches_answer_over_http(unlearned: WholeRun) -> None:
    expected = Attributor(unlearned.workspace).attribute_query("s0001", 4, "sketch")
    with serving(settings_of(unlearned)) as client:
        found = client.post("/v1/attribute", json={"query_id": "s0001", "k": 4, "tier": "sketch", "around": 0}).json()
    assert [hit["train_id"] for hit in found["hits"]] == [hit.train_id for hit in expected.hits]
    assert found["tier"] == "sketch" and found["lineage"] == expected.lineage


def test_a_run_whose_teacher_cannot_be_asked_says_so(client: TestClient) -> None:
    begun = client.post("/v1/attribute", json={"query_id": "s0001", "tier": "exact"}).json()
    place = f"/v1/jobs/{begun['job']}"
    told = until(lambda: (told := client.get(place).json())["state"] not in ("waiting", "running") and told)
    assert told["state"] == "failed" and "similarity" in told["error"] and "answer" in told


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    found = Jobs(tmp_path, Limits(jobs=1, waiting_jobs=1), ServiceMetrics(), workers=1)
    yield found
    found.stop()


def state(jobs: Jobs, job: str, owner: str = "me") -> str:
    return str(json.loads(jobs.read(owner, job))["state"])


def test_a_job_that_is_called_off_ends_at_the_works_next_checkpoint(jobs: Jobs) -> None:
    begun = threading.Event()

    def work(_: Callable[[float], None]) -> Answer:
        begun.set()
        while True:
            time.sleep(0.01)
            checkpoint()

    job = jobs.submit("me", work).job
    assert begun.wait(WAIT)
    with pytest.raises(Problem, match="no such job of yours"):
        jobs.cancel("you", job)
    jobs.cancel("me", job)
    until(lambda: state(jobs, job) == "cancelled")
    with pytest.raises(Problem, match="no such job of yours"):
        jobs.read("you", job)


def test_no_more_jobs_wait_than_may_and_a_failed_one_says_why(jobs: Jobs) -> None:
    go = threading.Event()

    def waits(progress: Callable[[float], None]) -> Answer:
        progress(0.5)
        go.wait(WAIT)
        return ANSWER

    def fails(_: Callable[[float], None]) -> Answer:
        raise UsageError("this teacher cannot be asked")

    first, second = jobs.submit("me", waits).job, jobs.submit("me", fails).job
    with pytest.raises(Problem) as refused:
        jobs.submit("me", waits)
    assert refused.value.status == 503 and refused.value.headers["Retry-After"]
    until(lambda: b'"progress":0.5' in jobs.read("me", first) or state(jobs, first) == "running")
    go.set()
    until(lambda: state(jobs, first) == "done")
    until(lambda: state(jobs, second) == "failed")
    assert b"this teacher cannot be asked" in jobs.read("me", second)
    third = jobs.submit("me", waits).job
    until(lambda: state(jobs, third) == "done")


def test_answers_are_forgotten_when_they_are_old(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, Limits(job_seconds=0.05), ServiceMetrics(), workers=1)
    job = jobs.submit("me", lambda _: ANSWER).job
    until(lambda: state(jobs, job) == "done")
    time.sleep(0.1)
    jobs.submit("me", lambda _: ANSWER)
    with pytest.raises(Problem):
        jobs.read("me", job)
    jobs.stop()
