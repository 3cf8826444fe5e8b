"""What the routes of one worker process share."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

from fastapi import Request
from PIL import Image

from storage_schemas.workspace import Workspace
from tasks.serving.answers import Answer
from tasks.serving.http.answering import answer_alone, answer_batch
from tasks.serving.http.audit import Audit
from tasks.serving.http.batching import Batcher, Full, Ticket, Waiting
from tasks.serving.http.cache import Answers, Pictures
from tasks.serving.http.engine import Engine
from tasks.serving.http.jobs import Job, Jobs
from tasks.serving.http.keys import Caller, Keys
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.questions import Question
from tasks.serving.http.settings import ServiceSettings
from tasks.serving.http.threads import one_thread
from tasks.serving.http.uploads import decoded

Result = TypeVar("Result")
SLOW = 32  # sketches, shares, filters and lists that may wait
READERS = 4  # threads that decode uploads and read tars: Pillow decodes without Python's lock


class Service:
    """The served version, the queue, the caches and the settings of one worker process."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings, self.limits = settings, settings.limits
        self.workspace = Workspace.at(settings.workspace)
        self.metrics = ServiceMetrics()
        self.engine = Engine(self.workspace, self.metrics, settings.poll_seconds)
        self.keys = Keys(Path(settings.keys)) if settings.keys else None
        self.audit = Audit(Path(settings.audit or f"{settings.keys}.audit.jsonl")) if settings.keys else None
        self.answers = Answers()
        self.pictures = Pictures(self.limits.thumbnail_bytes)
        self.batcher = Batcher(
            self._answer_batch,
            self.metrics,
            bound=self.limits.queue,
            size=self.limits.batch_size,
            milliseconds=self.limits.batch_milliseconds,
            threads=self.limits.threads or max(1, (os.cpu_count() or 1) // settings.workers),
        )
        self._runtime = None if settings.runtime else tempfile.TemporaryDirectory(prefix="fastgda-jobs-")
        folder = Path(settings.runtime or (self._runtime.name if self._runtime else ""))
        self.jobs = Jobs(folder, self.limits, self.metrics, settings.workers)
        self._waiting = 0
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="slow", initializer=one_thread)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader", initializer=one_thread)

    def start(self) -> None:
        self.engine.start()
        self.batcher.start()

    def stop(self) -> None:
        self.batcher.stop()
        self.jobs.stop()
        self.engine.stop()
        for pool in (self._readers, self._slow):
            pool.shutdown(cancel_futures=True)
        if self._runtime is not None:
            self._runtime.cleanup()

    async def reading(self, work: Callable[[], Result]) -> Result:
        """Run what waits for a disk or decodes in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    async def slowly(self, work: Callable[[], Result]) -> Result:
        """Run what may take seconds, one after the other, in a thread that nothing quick waits for.

        Raises:
            Full: as much waits as may.
        """
        if self._waiting >= SLOW:
            raise Full(503, f"{self._waiting} slow requests wait already: try again", "", {"Retry-After": "5"})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._slow, work)
        finally:
            self._waiting -= 1

    async def answer(self, question: Question, ticket: Ticket) -> Answer:
        """Answer a question of tier fast or sketch; those of tier fast together with others of the same time."""
        attributor, started = self.engine.current, time.perf_counter()
        # The newest take-down is looked for, in a store that may be far away.
        key = await self.reading(lambda: Answers.key(attributor, question)) if Answers.keeps(question) else None
        if key is not None and (kept := self.answers.get(key, started)) is not None:
            return kept
        if question.where is not None and question.tier == "fast":  # it is kept: no other question waits for it
            catalogue = attributor.catalogue(attributor.fast.samples_path)
            await self.slowly(lambda: catalogue.allowed(catalogue.present(), question.where))
        picture = await self._picture(question)
        if question.tier != "fast" or question.beside:
            ticket.step_aside()
            answer = await self.slowly(lambda: answer_alone(attributor, question, picture))
        else:
            answer = await asyncio.wrap_future(ticket.put(question, picture))
        if key is not None and answer.versions.published == attributor.versions.published:
            self.answers.put(key, answer)
        return answer

    async def begin(self, question: Question, caller: Caller) -> Job:
        """Begin a question of tier exact."""
        attributor, picture = self.engine.current, await self._picture(question)
        return self.jobs.submit(caller.name, lambda progress: answer_alone(attributor, question, picture, progress))

    async def _picture(self, question: Question) -> Image.Image | None:
        """Return the picture of a question, decoded; None where none came with it.

        Raises:
            Problem: it is none, or the stored query does not exist.
        """
        if question.query_id is not None:
            self.engine.query(question.query_id)
        content = question.image
        return None if content is None else await self.reading(lambda: decoded(content, self.limits))

    def _answer_batch(self, batch: Sequence[Waiting]) -> None:
        answer_batch(self.engine.current, batch, self.metrics)


def caller_of(request: Request) -> Caller:
    """Return whose request it is."""
    return cast(Caller, request.state.caller)


def service_of(request: Request) -> Service:
    """Return the service of the app that a request came to."""
    return cast(Service, request.app.state.service)
