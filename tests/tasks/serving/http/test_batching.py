"""Batches: what is known to be on its way is waited for, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.serving.answers import Agreement, Answer, Versions
from tasks.serving.http import service
from tasks.serving.http.batching import Batcher, Full, Waiting
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.questions import Question
from tests.tasks.serving.http.conftest import serving, settings_of
from tests.tasks.whole_runs import WholeRun

WAIT = 60.0
ANSWER = Answer("fast", [], [], [], Agreement("x", None, None, "t"), Versions(1, "r", "s", None, None), "l", 0.0)
QUESTION = Question(query_id="x")


class Batches:
    """A batcher of one thread that waits for others for a minute, and the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        limits = {"bound": 4, "size": 16, "milliseconds": 1000 * WAIT, "threads": 1}
        self.batcher = Batcher(self._run, ServiceMetrics(), **limits)

    def _run(self, batch: Sequence[Waiting]) -> None:
        self.sizes.append(len(batch))
        for waiting in batch:
            waiting.answered.set_result(ANSWER)


@pytest.fixture
def batches() -> Iterator[Batches]:
    found = Batches()
    found.batcher.start()
    yield found
    found.batcher.stop()


def test_a_question_waits_for_others_that_are_on_their_way(batches: Batches) -> None:
    with batches.batcher.admit() as first, batches.batcher.admit() as second:
        answers = [first.put(QUESTION, None), second.put(QUESTION, None)]
        assert [each.result(WAIT / 2) for each in answers] == [ANSWER, ANSWER]
    assert batches.sizes == [2]


def test_a_question_waits_for_none_that_is_answered_elsewhere(batches: Batches) -> None:
    with batches.batcher.admit() as sketch, batches.batcher.admit() as fast:
        answered = fast.put(QUESTION, None)
        assert not threading.Event().wait(0.1) and not answered.done()  # the other one may come
        sketch.step_aside()
        assert answered.result(WAIT / 2) == ANSWER
        with batches.batcher.admit() as later:  # while the sketch is still made
            assert later.put(QUESTION, None).result(WAIT / 2) == ANSWER
    assert batches.sizes == [1, 1]


def test_a_question_of_tier_fast_does_not_wait_for_a_sketch(similar: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(*_: object) -> Answer:
        begun.set()
        go.wait(WAIT)
        return ANSWER

    monkeypatch.setattr(service, "answer_alone", slow)
    limits = {"batch_milliseconds": 1000 * WAIT, "threads": 1}
    with serving(settings_of(similar, limits=limits)) as client, ThreadPoolExecutor(1) as pool:
        sketch = pool.submit(client.post, "/v1/attribute", json={"query_id": "s0000", "tier": "sketch"})
        assert begun.wait(WAIT)
        started = time.monotonic()
        assert client.post("/v1/attribute", json={"query_id": "s0001"}).status_code == 200
        assert time.monotonic() - started < WAIT / 2 and not sketch.done()
        go.set()
        assert sketch.result(WAIT).status_code == 200


def test_no_more_questions_are_admitted_than_may_wait(batches: Batches) -> None:
    with batches.batcher.admit(4), pytest.raises(Full, match="4 questions wait already"), batches.batcher.admit():
        pass
    with batches.batcher.admit() as ticket:
        assert ticket.put(QUESTION, None).result(WAIT / 2) == ANSWER
