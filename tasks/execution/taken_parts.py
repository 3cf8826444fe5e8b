"""A process that takes parts of a run from the workspace, one after the other, as long as there are any.

Any number of them may be at work, may come late and may die at any instant. The coordinator's order says which parts
are wanted, leases say which of them others are at, manifests say which are there. No server is asked.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field

from prefect.client.schemas.objects import State

from fastgda_core.interruption import stopping
from storage_schemas.commit import input_key
from storage_schemas.runs.lease import Claims
from storage_schemas.runs.liveness import asked
from storage_schemas.runs.orders import Order, read_order
from storage_schemas.workspace import Workspace
from tasks import logs
from tasks.config.execution import ExecutionConfig
from tasks.execution.fan_out import log_failure, may_pass, part_made
from tasks.execution.number_ranges import from_ranges
from tasks.execution.worker import worker_on
from tasks.parts import Parts
from tasks.teaching.run import load_run

log = logging.getLogger("fastgda.execution.taken")
LOOK_SECONDS = 2.0  # between two looks for something to do, at least
LISTING_SECONDS = 5.0  # between two listings of what is there, at least


@dataclass
class TakenParts:
    """The parts of a run that this process makes.

    execution: how patiently, and how long it waits for work.
    share: the place of this process among all, from 0 to 1: where in the list of parts it begins.
    made: how many it has made so far.
    idle: it has found nothing to take at least once.
    """

    location: str
    run: str
    execution: ExecutionConfig
    share: float
    made: int = 0
    idle: bool = False
    _failed: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # by coordinator and kind

    def __post_init__(self) -> None:
        self._workspace = Workspace.at(self.location)
        self._claims = Claims(self._workspace)
        self._pause = LOOK_SECONDS

    def make_all(self) -> str:
        """Make parts until there is nothing to do for a while, or somebody stops it; return why it ends."""
        idle_since = time.monotonic()
        worker = worker_on(self.location, self.run)
        worker.show()
        try:
            while True:
                if stopping():
                    return "it was told to end"
                if asked(self._workspace, self.run) is not None:
                    return "the run is to pause or to stop"
                order = read_order(self._workspace, self.run)
                if order is None:
                    return "the run wants nothing more"
                if self._pass(order):
                    idle_since = time.monotonic()
                    continue
                self.idle = True
                if time.monotonic() - idle_since > self.execution.slurm.idle_seconds:
                    return "there is nothing to take"
                _waited(min(self._pause, self.execution.slurm.idle_seconds))
        finally:
            worker.leave()  # no sign of life comes after the last one
            worker.end()

    def _pass(self, order: Order) -> bool:
        """Go once through the missing parts and make those that nobody is at; return whether any was tried.

        The pass ends early when others turn out to be where this process is, so that the list is read anew.
        """
        run = load_run(self.location, self.run, order.assignment)
        parts, tried, listed = run.parts[order.kind], False, time.monotonic()
        for number in self._wanted(order, parts):
            if stopping() or read_order(self._workspace, self.run) != order:
                return tried
            with self._claims.claim(_lease_of(parts, number)) as mine:
                there = not mine or parts.made(number) is not None
                if not there:
                    tried = True
                    if not self._make(order, number):
                        return tried
            if there and time.monotonic() - listed > LISTING_SECONDS:
                return tried
        return tried

    def _wanted(self, order: Order, parts: Parts) -> list[int]:
        """Return the missing parts, from this process's place in the list on, so that few take the same at once."""
        numbers, started = from_ranges(order.numbers), time.monotonic()
        missing = set(parts.missing()) - self._failed.get((order.given_by, order.kind), set()) if numbers else set()
        # A listing may take long, and many processes make one.
        self._pause = max(LOOK_SECONDS, 20 * (time.monotonic() - started))
        wanted = [number for number in numbers if number in missing]
        start = int(self.share * len(wanted))
        return wanted[start:] + wanted[:start]

    def _make(self, order: Order, number: int) -> bool:
        """Make a part, with the retries that the run allows it; return False where somebody stopped it."""
        attempts = 1 + self.execution.retries
        with logs.about(run=self.run, kind=order.kind, part=number):
            for attempt in range(1, attempts + 1):
                try:
                    done = part_made(self.location, self.run, order.assignment, order.kind, number, order.timeout)
                except Exception as error:
                    log_failure(order.kind, number, error, attempt, attempts)
                    if attempt == attempts or not may_pass(error):
                        self._failed.setdefault((order.given_by, order.kind), set()).add(number)
                        return True
                    if not _waited(self.execution.retry_delay * 2 ** (attempt - 1) * random.uniform(1.0, 1.5)):
                        return False
                else:
                    if isinstance(done, State):
                        return False
                    self.made += 1
                    return True
        return True


def _lease_of(parts: Parts, number: int) -> str:
    """Return the key of the lease of a part: the same in all runs that share it."""
    return f"part-{input_key(parts.kind, parts.key(number), number)}"


def _waited(seconds: float) -> bool:
    """Wait; return False where this process is told to end meanwhile."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stopping():
            return False
        time.sleep(min(0.5, max(0.0, until - time.monotonic())))
    return True
