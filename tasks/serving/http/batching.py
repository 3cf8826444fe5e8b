"""Questions of several requests that are encoded together, and a bound on how many wait."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from tasks.serving.answers import Answer
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.problems import Problem
from tasks.serving.http.questions import Question
from tasks.serving.http.threads import one_thread


@dataclass
class Waiting:
    """A question in the queue; picture: of one that is to be encoded."""

    question: Question
    picture: Image.Image | None
    answered: Future[Answer] = field(default_factory=Future)


Run = Callable[[Sequence[Waiting]], None]


class Full(Problem):
    """As many questions wait as may."""


class Batcher:
    """Threads that take questions from a queue in batches and answer them.

    A batch is what waits. It grows, up to `size` and for `milliseconds`, only while further questions are known to be
    on their way (admitted, their bytes being read or decoded): a question that comes alone waits for nobody.
    """

    def __init__(
        self, run: Run, metrics: ServiceMetrics, *, bound: int, size: int, milliseconds: float, threads: int
    ) -> None:
        self._run, self._metrics = run, metrics
        self._bound, self._size, self._wait = bound, size, milliseconds / 1000
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._admitted = 0  # questions from admission to answer
        self._coming = 0  # of these, those that are not in the queue yet
        self._idle = 0  # threads that wait for a batch
        self._seconds = 0.05  # of one question, a moving mean
        self._ended = False
        self._threads = [
            threading.Thread(target=self._work, name=f"answers-{number}", daemon=True) for number in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Answer what waits, and end the threads."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=30)

    @contextmanager
    def admit(self, questions: int = 1) -> Iterator[Ticket]:
        """Take questions in, from before their images are decoded until they are answered.

        Raises:
            Full: as many wait as may.
        """
        with self._changed:
            if self._admitted + questions > max(self._bound, questions):
                seconds = max(1, math.ceil(self._admitted * self._seconds / len(self._threads)))
                raise Full(
                    503,
                    f"{self._admitted} questions wait already: try again in {seconds} s",
                    headers={"Retry-After": str(seconds)},
                )
            self._admitted += questions
            self._coming += questions
        self._metrics.queue.inc(questions)
        ticket = Ticket(self, questions)
        try:
            yield ticket
        finally:
            with self._changed:
                self._admitted -= questions
                self._coming -= ticket.coming
                self._changed.notify_all()
            self._metrics.queue.dec(questions)

    def _step_aside(self, questions: int) -> None:
        with self._changed:
            self._coming -= questions
            self._changed.notify_all()

    def _put(self, waiting: Waiting) -> None:
        with self._changed:
            if self._ended:
                raise Problem(503, "the service is ending: ask again", headers={"Retry-After": "1"})
            self._queue.append(waiting)
            self._coming -= 1
            self._changed.notify()

    def _take(self) -> list[Waiting]:
        """Return the next batch; nothing at the end."""
        with self._changed:
            self._idle += 1
            try:
                return self._taken()
            finally:
                self._idle -= 1

    def _taken(self) -> list[Waiting]:
        while not self._queue:
            if self._ended:
                return []
            self._changed.wait()
        until = time.monotonic() + self._wait
        while len(self._queue) < self._size and self._coming and not self._ended:
            left = until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                break
        # Threads that have nothing to do take their part: together is not faster than beside each other.
        fair = math.ceil(len(self._queue) / max(1, self._idle))
        return [self._queue.popleft() for _ in range(min(self._size, fair))]

    def _work(self) -> None:
        one_thread()
        while True:
            batch = self._take()
            if not batch and self._ended:
                return
            wanted = [waiting for waiting in batch if waiting.answered.set_running_or_notify_cancel()]
            if not wanted:
                continue
            started = time.perf_counter()
            try:
                self._run(wanted)
            except Exception as error:
                for waiting in wanted:
                    if not waiting.answered.done():
                        waiting.answered.set_exception(error)
            each = (time.perf_counter() - started) / len(wanted)
            self._seconds += 0.1 * (each - self._seconds)
            self._metrics.batch_size.observe(len(wanted))


@dataclass
class Ticket:
    """The right to put so many questions into the queue."""

    batcher: Batcher
    coming: int

    def put(self, question: Question, picture: Image.Image | None) -> Future[Answer]:
        waiting = Waiting(question, picture)
        self.coming -= 1
        self.batcher._put(waiting)
        return waiting.answered

    def step_aside(self) -> None:
        """Let no batch wait for this: it is answered without the queue."""
        aside, self.coming = self.coming, 0
        self.batcher._step_aside(aside)
