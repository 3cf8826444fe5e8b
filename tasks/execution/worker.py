"""A process that makes parts: its signs of life, its attempt records, and how it is told to stop."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from prefect.runtime import flow_run

from fastgda_core.errors import Remedy, Stopped, TransientError, device_lost, remedy
from fastgda_core.interruption import checked_by, stopping
from storage_schemas.commit import Manifest, made_in, worker_name
from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.runs.liveness import BEAT_SECONDS, Beat, RunRequest, asked, write_beat
from storage_schemas.workspace import Workspace
from tasks import logs
from tasks.context import Context
from tasks.execution.outcomes import PartHangs

log = logging.getLogger("fastgda.execution.worker")
LOST_DEVICE = 75  # exit code of a process that may not use its device again (EX_TEMPFAIL)
HUNG_FACTOR = 1.5  # x the time limit of a part, after which it hangs within a micro-batch: its process is ended
LAST_WORDS_SECONDS = 60.0  # that a coordinator has to say why it ends, when a thread of its own hangs
LOOK_SECONDS = {True: 0.5, False: 2.0}  # between two looks for a wish to stop: on disk, in an object store


def slurm_task() -> str:
    """Return the Slurm task that this process is, as 12_3 or 12; nothing where it is none."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


_coordinated: set[str] = set()


def coordinate_here(run: str) -> None:
    """Note that this process coordinates the run, and outlives the parts that it makes itself."""
    _coordinated.add(run)


def coordinator_here(run: str) -> bool:
    return run in _coordinated


_at_work: dict[str, Worker] = {}  # by the run a part of which is being made in this process


def raise_if_hung(run: str, timeout: float | None) -> None:
    """Look at a part that a thread of this coordinator makes.

    Raises:
        PartHangs: the part is far beyond its time limit. The process ends once its main thread has, or a minute later:
            Python would wait for the thread for ever.
    """
    worker = _at_work.get(run)
    if coordinator_here(run) and worker is not None and timeout is not None:
        worker.raise_if_hung(timeout)


def _end_process() -> None:
    threading.main_thread().join(LAST_WORDS_SECONDS)
    os._exit(LOST_DEVICE)


class TookTooLong(TransientError):
    """A part takes much longer than it was estimated to: another try, or another machine, may do better."""


@dataclass(eq=False)
class Worker:
    """This process at work on one run."""

    workspace: Workspace
    run: str
    _state: Beat = field(init=False)
    _since: float = 0.0
    _looked: float = 0.0
    _wish: RunRequest | None = None
    _beats_failed: Exception | None = None
    _logs: dict[str, AttemptLog] = field(default_factory=dict)
    _leaving: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        job, slurm = flow_run.get_id() or "", slurm_task()
        self._state = Beat(worker=worker_name(), beat=0, at=datetime.now(UTC), job=job, slurm=slurm)
        threading.Thread(target=self._beat, name=f"beats of {self.run}", daemon=True).start()
        atexit.register(self.end)

    @contextmanager
    def at_work(self, context: Context, kind: str, number: int, timeout: float | None) -> Iterator[None]:
        """Record the attempt at a part that is made in the block, show the process at work, and let it be stopped.

        A micro-batch that never ends cannot look for a wish to stop. This process ends then, with the place where it
        hangs on standard error, and others make the part again; unless it coordinates the run (`raise_if_hung`).

        Raises:
            TookTooLong: the work looked, between two micro-batches, after more than `timeout` seconds.
        """
        self._since = time.monotonic()
        self._tell(kind=kind, number=number, device=str(context.device), job=flow_run.get_id() or "")
        attempts = self._logs.setdefault(kind, AttemptLog(self.workspace, self.run, kind=kind))
        _at_work[self.run] = self
        if timeout is not None and not coordinator_here(self.run):
            # A thread in C does this: it comes to its turn even where the work holds Python's lock.
            faulthandler.dump_traceback_later(HUNG_FACTOR * timeout, exit=True, file=2)
        try:
            with (
                made_in(flow_run.get_id() or ""),
                checked_by(lambda: self._check(timeout)),
                attempts.attempt(number, str(context.device), leaving=Stopped),
            ):
                self.stop_if_asked()
                try:
                    yield
                except RuntimeError as error:
                    if device_lost(error) and not coordinator_here(self.run):
                        log.error("the device is lost, and this process ends: %s", error)
                        # A fresh process gets the device back: a pool, Ray or Dask starts one. The attempt has no end,
                        # which counts as a worker that died over it.
                        os._exit(LOST_DEVICE)
                    raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            _at_work.pop(self.run, None)
            halvings = sum(context.micro_batch(purpose).halvings for purpose in ("losses", "gradients"))
            memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            self._tell(kind="", number=-1, out_of_memory=halvings, device_memory=memory)

    def finished(self, manifest: Manifest) -> None:
        """Count a part that was made."""
        state = self._state
        self._tell(parts=state.parts + 1, rows=state.rows + manifest.rows, seconds=state.seconds + manifest.seconds)

    def stop_if_asked(self) -> None:
        """Raise Stopped when the run is to pause or to stop; raise the error that keeps signs of life unwritten."""
        if self._beats_failed is not None:
            raise self._beats_failed
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS[isinstance(self.workspace.root, Path)]:
            self._looked = now
            self._wish = asked(self.workspace, self.run)
        if self._wish is not None or self._leaving.is_set() or stopping():
            raise Stopped

    def _check(self, timeout: float | None) -> None:
        self.stop_if_asked()
        if timeout is not None and time.monotonic() - self._since > timeout:
            raise TookTooLong(f"not there after {timeout:.0f} s, {self._state.device} on {self._state.worker}")

    def leave(self) -> None:
        """Stop at the next micro-batch, for good."""
        self._leaving.set()
        worker_on.cache_clear()

    def _tell(self, **changes: object) -> None:
        with self._lock:
            self._state = self._state.model_copy(update=changes)

    def _beat(self) -> None:
        while not self._leaving.wait(0.2 if self._state.beat == 0 else BEAT_SECONDS):
            try:
                self._write()
            except Exception as error:
                # Without signs of life this process counts as dead before long, and its work is given to others.
                self._beats_failed = error
                with logs.about(run=self.run):
                    log.error("signs of life cannot be written, and this process stops: %s", error)
                self.leave()

    def raise_if_hung(self, timeout: float) -> None:
        """Raise PartHangs where the part at hand is far beyond `timeout`, and have the process end soon after."""
        state, seconds = self._state, time.monotonic() - self._since
        if not state.kind or seconds < HUNG_FACTOR * timeout:
            return
        error = PartHangs(
            f"run {self.run}: {state.kind} {state.number:05d} hangs: it has not come back for {seconds:.0f} s, and a "
            f"part may take {timeout:.0f} s (execution.timeout_factor, timeout_floor); this process "
            f"ends, what is finished is kept, and `fastgda retry {self.run}` goes on"
        )
        self._logs[state.kind].record(state.number, ShardState.failed, seconds=seconds, error=error)
        with logs.about(run=self.run, kind=state.kind, part=state.number):
            log.error("%s", error)
        threading.Thread(target=_end_process, name="end of a process that hangs", daemon=True).start()
        raise error

    def show(self) -> None:
        """Give a sign of life now, from which others know what this process was, however soon it dies."""
        self._write()

    def _write(self, *, ended: bool = False) -> None:
        seconds = time.monotonic() - self._since if self._state.kind else 0.0
        self._tell(beat=self._state.beat + 1, at=datetime.now(UTC), part_seconds=seconds, ended=ended)
        try:
            write_beat(self.workspace, self.run, self._state)
        except Exception as error:
            if remedy(error) is not Remedy.retry:
                raise
            # The next one may get through; work that cannot commit fails by itself.

    def end(self) -> None:
        """Say that this process is done with the run for now."""
        if self._state.beat and self._beats_failed is None:
            with contextlib.suppress(OSError):  # as of a full disk, of which the work itself has told
                self._write(ended=True)


@functools.lru_cache(maxsize=4)
def worker_on(location: str, run: str) -> Worker:
    """Return this process's worker of a run."""
    return Worker(Workspace.at(location), run)


def leave_for_good(location: str, run: str) -> None:
    """Say that this process is done with a run, or with what was done before one, and goes on with other work."""
    worker = worker_on(location, run)
    worker.leave()
    worker.end()
