"""Questions that take minutes: each is a job, whose state lies in a file that every worker process can read.

An image is never written down; an answer is, in a folder of this service alone, until it is `job_seconds` old.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from fastgda_core.interruption import checked_by
from storage_schemas.files import temporary_name
from tasks.serving.answers import Answer
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.problems import Problem, problem_of
from tasks.serving.http.replies import encoded
from tasks.serving.http.settings import Limits
from tasks.serving.http.threads import one_thread

log = logging.getLogger("fastgda.serving")
SHOWN_SECONDS = 0.2  # progress is written down so often
_ID = re.compile(r"[0-9a-f]{32}")
Progress = Callable[[float], None]
State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Job(BaseModel):
    """A question of tier exact on its way."""

    job: str = Field(description="its id, for /v1/jobs/{id}")
    state: State = "waiting"
    progress: float = Field(default=0.0, ge=0, le=1, description="share of the work that is done")
    answer: Answer | None = None
    error: str | None = None
    where: str | None = None


class CancelledJob(Exception):
    """Nobody wants the answer any more."""


class Jobs:
    """The jobs of one worker process; `folder` is shared with the others."""

    def __init__(self, folder: Path, limits: Limits, metrics: ServiceMetrics, workers: int) -> None:
        self._folder, self._limits, self._metrics = folder, limits, metrics
        at_work = max(1, limits.jobs // workers)
        self._bound = at_work + limits.waiting_jobs // workers
        self._pool = ThreadPoolExecutor(at_work, thread_name_prefix="job", initializer=one_thread)
        self._open, self._lock, self._ended = 0, threading.Lock(), False

    def submit(self, owner: str, work: Callable[[Progress], Answer]) -> Job:
        """Begin a job, as soon as there is room.

        Raises:
            Problem: as many wait as may.
        """
        self._forget_old()
        with self._lock:
            if self._open >= self._bound:
                raise Problem(503, f"{self._open} jobs wait already: try again later", "tier", {"Retry-After": "30"})
            self._open += 1
        self._metrics.jobs.inc()
        job = Job(job=secrets.token_hex(16))
        self._write(owner, job)
        self._pool.submit(self._run, owner, job, work).add_done_callback(lambda _: self._close())
        return job

    def read(self, owner: str, job: str) -> bytes:
        """Return a job as JSON.

        Raises:
            Problem: there is no such job, or another key's.
        """
        try:
            content = self._path(job).read_bytes()
        except FileNotFoundError:
            raise self._unknown() from None
        told, _, body = content.partition(b"\n")
        if json.loads(told) != owner:
            raise self._unknown()
        return body

    def cancel(self, owner: str, job: str) -> None:
        """Ask a job to stop; its work ends at the next step.

        Raises:
            Problem: as `read`.
        """
        self.read(owner, job)
        self._path(job).with_suffix(".cancel").touch()

    def stop(self) -> None:
        """End all jobs."""
        self._ended = True
        self._pool.shutdown(cancel_futures=True)

    def _run(self, owner: str, job: Job, work: Callable[[Progress], Answer]) -> None:
        shown = reached = 0.0

        def progress(share: float) -> None:
            nonlocal shown, reached
            reached = share
            if self._ended or self._path(job.job).with_suffix(".cancel").exists():
                raise CancelledJob
            if time.monotonic() - shown > SHOWN_SECONDS:
                self._write(owner, job.model_copy(update={"state": "running", "progress": min(max(share, 0.0), 1.0)}))
                shown = time.monotonic()

        changes: dict[str, object]
        try:
            progress(0.0)
            with checked_by(lambda: progress(reached)):
                changes = {"state": "done", "progress": 1.0, "answer": work(progress)}
        except CancelledJob:
            changes = {"state": "cancelled", "error": "the job was cancelled"}
        except Exception as error:
            problem = problem_of(error)
            changes = {"state": "failed", "error": problem.error, "where": problem.where}
        self._write(owner, job.model_copy(update=changes))

    def _write(self, owner: str, job: Job) -> None:
        path = self._path(job.job)
        temporary = path.with_name(temporary_name(path.name))
        temporary.write_bytes(json.dumps(owner).encode() + b"\n" + encoded(dict(job)))
        temporary.replace(path)

    def _path(self, job: str) -> Path:
        if not _ID.fullmatch(job):
            raise self._unknown()
        return self._folder / f"{job}.json"

    def _unknown(self) -> Problem:
        kept = f"{self._limits.job_seconds / 60:.0f} minutes"
        return Problem(404, f"there is no such job of yours: an answer is kept for {kept}", "job")

    def _close(self) -> None:
        with self._lock:
            self._open -= 1
        self._metrics.jobs.dec()

    def _forget_old(self) -> None:
        for path in self._folder.glob("*.json"):
            try:
                if time.time() - path.stat().st_mtime > self._limits.job_seconds:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".cancel").unlink(missing_ok=True)
            except FileNotFoundError:
                continue
