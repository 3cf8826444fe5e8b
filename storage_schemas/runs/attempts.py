"""Attempt records of workers: one file a worker process, which no other process writes.

A record without a kind is of a score shard; other kinds of parts have folders of their own.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from storage_schemas.commit import worker_name
from storage_schemas.files import matching, read_whole, replace
from storage_schemas.workspace import Workspace


class ShardState(StrEnum):
    """The state of a score shard or another part."""

    pending = "pending"
    running = "running"
    done = "done"
    failed = "failed"
    quarantined = "quarantined"


class Attempt(BaseModel):
    """One line of a worker's attempt file: the start of a shard, or its end."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    shard: int
    state: ShardState
    at: datetime
    worker: str
    device: str = ""
    seconds: float = 0.0
    error_class: str = ""
    error: str = ""


MAX_ERROR = 2_000  # characters of a message that an attempt record keeps


@dataclass
class AttemptLog:
    """The attempt records of one worker on one run: a file that no other process writes.

    A record is one line, appended whole. An object store cannot append, so there the whole file is written again with
    each record.
    """

    workspace: Workspace
    run: str
    worker: str = field(default_factory=worker_name)
    kind: str = "scores"
    _lines: list[bytes] = field(default_factory=list, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        name = "".join(letter if letter.isalnum() else "-" for letter in self.worker)
        self._path = self.workspace.attempts(self.run, self.kind) / f"{name}-{uuid.uuid4().hex[:8]}.jsonl"

    @contextmanager
    def attempt(self, shard: int, device: str, leaving: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
        """Record that `shard` is being worked on and, when the block fails, the error; the manifest records success.

        A shard that was left by an error of class `leaving`, as somebody asked for it, is pending again.
        """
        started = time.monotonic()
        self.record(shard, ShardState.running, device=device)
        try:
            yield
        except leaving:
            self.record(shard, ShardState.pending, device=device)
            raise
        except BaseException as error:
            seconds = time.monotonic() - started
            self.record(shard, ShardState.failed, device=device, seconds=seconds, error=error)
            raise

    def record(
        self,
        shard: int,
        state: ShardState,
        *,
        device: str = "",
        seconds: float = 0.0,
        error: BaseException | None = None,
    ) -> None:
        """Add one line. After a `pending` one, as `fastgda retry` adds, the shard's earlier attempts do not count."""
        attempt = Attempt(
            shard=shard,
            state=state,
            at=datetime.now(UTC),
            worker=self.worker,
            device=device,
            seconds=seconds,
            error_class=type(error).__name__ if error else "",
            # A file name in a message may have bytes that are no text.
            error=str(error)[:MAX_ERROR].encode(errors="backslashreplace").decode() if error else "",
        )
        line = json.dumps(attempt.model_dump(mode="json")).encode() + b"\n"
        with self._lock:
            if isinstance(self._path, Path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                try:
                    os.write(handle, line)
                finally:
                    os.close(handle)
            else:
                self._lines.append(line)
                replace(self._path, b"".join(self._lines))


def read_attempts(workspace: Workspace, run: str, kind: str = "scores") -> dict[int, list[Attempt]]:
    """Read the attempt records of each shard since it was last released, oldest first.

    A line that a crash cut short is passed over.
    """
    found: dict[int, list[Attempt]] = {}
    for path in matching(workspace.attempts(run, kind), "*.jsonl"):
        for line in read_whole(path).splitlines():
            try:
                attempt = Attempt.model_validate_json(line)
            except ValidationError:
                continue
            found.setdefault(attempt.shard, []).append(attempt)
    for several in found.values():
        several.sort(key=lambda attempt: attempt.at)
        released = [place for place, attempt in enumerate(several) if attempt.state == ShardState.pending]
        if released:
            del several[: released[-1] + 1]
    return found


def deaths(attempts: list[Attempt]) -> int:
    """Count the starts among these attempts that have no end: their worker is gone, or still at work."""
    starts = Counter(attempt.worker for attempt in attempts if attempt.state == ShardState.running)
    ends = Counter(attempt.worker for attempt in attempts if attempt.state == ShardState.failed)
    return sum(max(0, count - ends[worker]) for worker, count in starts.items())
