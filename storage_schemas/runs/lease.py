"""Leases: one process makes a thing; others that want it wait for it, and one takes over if the maker dies.

`Claims` are of one that takes what nobody else is at, and waits for nothing.

A lease is a folder of small files, numbered in the order in which makers came; the last is the one that counts. A file
is created only where its number is free, so exactly one process follows a maker that is gone. Only its maker replaces
it, as a sign of life. The files are deleted when the thing is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from storage_schemas.commit import worker_name
from storage_schemas.files import AnyPath, create, matching, read_whole, remove, replace
from storage_schemas.runs.liveness import BEAT_SECONDS, process_lives
from storage_schemas.workspace import Workspace

LOST_SECONDS = 60.0  # without a sign of life, after which a maker on another host counts as dead
LOOK_SECONDS = 1.0


class Lease(BaseModel):
    """`leases/<key>/<number>.json`: a process makes the thing of this key. A reader goes by `beat`, not by a clock."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    owner: str = Field(description="host:process")
    beat: int = Field(default=0, ge=0, description="how often it has told")
    ended: bool = Field(default=False, description="it has stopped by itself, and the thing is not there")


@contextmanager
def sole_maker(
    workspace: Workspace, key: str, ready: Callable[[], bool], waiting: Callable[[str], None]
) -> Iterator[None]:
    """Let one process at a time into the block, until the thing is ready.

    The block has to look once more whether the thing is there, and to make it where it is not.

    Args:
        key: of the thing.
        ready: returns whether the thing is there, as its manifest says.
        waiting: called once with the process that makes it.
    """
    path = _taken(workspace.lease(key), ready, waiting)
    if path is None:
        yield
        return
    beats = _Beats(path)
    try:
        yield
    finally:
        beats.end()
        if ready():
            for file in matching(path.parent, "*.json"):
                remove(file)
        else:
            beats.write(ended=True)


def _taken(folder: AnyPath, ready: Callable[[], bool], waiting: Callable[[str], None]) -> AnyPath | None:
    """Take the lease for this process and return its path; None where the thing is ready."""
    holder, told = _Holder(folder), False
    while not ready():
        owner = holder.look()
        if owner is None:
            path = holder.succeed()
            if path is not None:
                return path
            continue
        if not told:
            told = True
            waiting(owner)
        time.sleep(LOOK_SECONDS)
    return None


@dataclass
class _Holder:
    """The holder of one lease, as this process sees it from look to look."""

    folder: AnyPath
    _seen: tuple[int, Lease | None] = (0, None)
    _since: float = field(default_factory=time.monotonic)

    def look(self) -> str | None:
        """Return the process that holds the lease; None where there is none, or it is gone."""
        last = _, lease = _last(self.folder)
        if last != self._seen:
            self._seen, self._since = last, time.monotonic()
        if lease is None or lease.ended or not process_lives(lease.owner):
            return None
        return None if time.monotonic() - self._since > LOST_SECONDS else lease.owner

    def succeed(self) -> AnyPath | None:
        """Take the lease after whom `look` saw last, and return its path; None where another process was faster."""
        number = self._seen[0] + 1
        path = self.folder / f"{number:06d}.json"
        # A number below one that others hold is free again once they cleared up behind themselves.
        taken = create(path, _content(Lease(owner=worker_name()))) and _last(self.folder)[0] == number
        return path if taken else None


@dataclass
class Claims:
    """The leases of a process that takes, of many things, those that nobody else is at."""

    workspace: Workspace
    _holders: dict[str, _Holder] = field(default_factory=dict)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold the lease of the thing of this key during the block; yield False where another process holds it.

        The block has to look whether the thing is there: its maker clears the lease away whether or not it was made.
        """
        path = self._taken(key)
        if path is None:
            yield False
            return
        beats = _Beats(path)
        try:
            yield True
        finally:
            beats.end()
            for file in matching(path.parent, "*.json"):
                if file.name <= path.name:  # a later one is of a process that took this one for dead
                    remove(file)
            if isinstance(path, Path):
                with suppress(OSError):  # others came
                    path.parent.rmdir()

    def _taken(self, key: str) -> AnyPath | None:
        holder = self._holders.pop(key, None) or _Holder(self.workspace.lease(key))
        try:
            path = holder.succeed() if holder.look() is None else None
        except FileNotFoundError:  # its holder cleared the folder away this instant
            path = None
        if path is None:
            self._holders[key] = holder
        return path


def _last(folder: AnyPath) -> tuple[int, Lease | None]:
    """Return number and content of the lease that counts; 0 and None where there is none."""
    files = matching(folder, "*.json")
    try:
        return (int(files[-1].stem), Lease.model_validate_json(read_whole(files[-1]))) if files else (0, None)
    except FileNotFoundError:  # its maker cleared up this instant
        return 0, None


def under_way(workspace: Workspace, within: timedelta) -> bool:
    """Return whether some process may be making something: it holds a lease, is not known to be dead, and told so."""
    for folder in {path.parent for path in matching(workspace.root / "leases", "*/*.json")}:
        number, lease = _last(folder)
        if lease is None or lease.ended or not process_lives(lease.owner):
            continue
        with suppress(FileNotFoundError):
            if time.time() - (folder / f"{number:06d}.json").stat().st_mtime < within.total_seconds():
                return True
    return False


def _content(lease: Lease) -> bytes:
    return lease.model_dump_json().encode() + b"\n"


@dataclass
class _Beats:
    """Signs of life of this process in its lease, written by a thread."""

    path: AnyPath

    def __post_init__(self) -> None:
        self._count, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"beats of {self.path.parent.name}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.write()

    def write(self, *, ended: bool = False) -> None:
        self._count += 1
        # A fault of the store stops the work itself, too, which reports it; the next beat may get through.
        with suppress(Exception):
            replace(self.path, _content(Lease(owner=worker_name(), beat=self._count, ended=ended)))

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
