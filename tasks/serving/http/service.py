"""What the routes of one worker process share."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from fastapi import Request

from storage_schemas.workspace import Workspace
from tasks.serving.answers import Answer
from tasks.serving.http.batching import Batcher, Ticket, Waiting
from tasks.serving.http.cache import Pictures
from tasks.serving.http.engine import Engine
from tasks.serving.http.jobs import Job, Jobs
from tasks.serving.http.keys import Caller, Keys
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.problems import Problem
from tasks.serving.http.questions import Question
from tasks.serving.http.settings import ServiceSettings
from tasks.serving.http.threads import one_thread
from tasks.serving.http.uploads import decoded

Result = TypeVar("Result")
READERS = 4  # threads that decode uploads and read tars: Pillow decodes without Python's lock


class Service:
    """The served version, the queue, the caches and the settings of one worker process."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings, self.limits = settings, settings.limits
        self.workspace = Workspace.at(settings.workspace)
        self.metrics = ServiceMetrics()
        self.engine = Engine(self.workspace, self.metrics, settings.poll_seconds)
        self.keys = Keys(Path(settings.keys)) if settings.keys else None
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
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader", initializer=one_thread)

    def start(self) -> None:
        self.engine.start()
        self.batcher.start()

    def stop(self) -> None:
        self.batcher.stop()
        self.jobs.stop()
        self.engine.stop()
        self._readers.shutdown(cancel_futures=True)
        if self._runtime is not None:
            self._runtime.cleanup()

    async def reading(self, work: Callable[[], Result]) -> Result:
        """Run what waits for a disk or decodes in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    async def answer(self, question: Question, ticket: Ticket) -> Answer:
        """Answer a question of tier fast or sketch, together with others that come at the same time."""
        picture = None
        if question.image is not None:
            content = question.image
            picture = await self.reading(lambda: decoded(content, self.limits))
        return await asyncio.wrap_future(ticket.put(question, picture))

    async def begin(self, question: Question, caller: Caller) -> Job:
        """Begin a question of tier exact."""
        attributor = self.engine.current
        asked = {"where": question.where, "exclude": question.exclude}
        picture, caption = None, question.caption
        if question.query_id is not None:
            query = self.engine.query(question.query_id)
            picture, caption = await self.reading(lambda: query.image), query.caption
        elif question.image is not None:
            content = question.image
            picture = await self.reading(lambda: decoded(content, self.limits))
        else:
            raise Problem(400, "tier exact needs an image and its caption, or a query_id", "image")
        return self.jobs.submit(
            caller.name,
            lambda progress: attributor.attribute(picture, caption, question.k, "exact", **asked),
        )

    def _answer_batch(self, batch: Sequence[Waiting]) -> None:
        """Answer the questions of a batch, all by one version."""
        attributor = self.engine.current
        pictured = [waiting for waiting in batch if waiting.picture is not None]
        vectors = {}
        if pictured:
            with self.metrics.encode_seconds.time():
                found = attributor.encode_many(
                    [waiting.picture for waiting in pictured if waiting.picture is not None],
                    [waiting.question.caption or "" for waiting in pictured],
                )
            vectors = {id(waiting): vector for waiting, vector in zip(pictured, found, strict=True)}
        for waiting in batch:
            question = waiting.question
            options: dict[str, Any] = {"where": question.where, "exclude": question.exclude}
            try:
                if question.query_id is not None:
                    answer = attributor.attribute_query(question.query_id, question.k, **options)
                else:
                    vector = vectors[id(waiting)] if waiting.picture is not None else question.array(attributor.width)
                    answer = attributor.attribute_vector(vector, question.k, **options)
                waiting.answered.set_result(answer)
            except Exception as error:
                waiting.answered.set_exception(error)


def caller_of(request: Request) -> Caller:
    """Return whose request it is."""
    return cast(Caller, request.state.caller)


def service_of(request: Request) -> Service:
    """Return the service of the app that a request came to."""
    return cast(Service, request.app.state.service)
