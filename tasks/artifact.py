"""Files that tasks make, by name, key and rows; each is made once, whoever asks for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace

from storage_schemas.commit import Manifest, committed
from storage_schemas.files import AnyPath
from storage_schemas.runs import lease
from storage_schemas.workspace import Workspace
from tasks.progress import console

log = logging.getLogger("fastgda.lease")


@dataclass(frozen=True)
class Artifact:
    """A file or folder that is committed, or will be: its name for people, its input key, its place, its rows."""

    name: str
    key: str
    path: AnyPath
    rows: int


@dataclass(frozen=True)
class Made:
    """An artifact that is there, the seconds of work behind it, and whether it was there before."""

    artifact: Artifact
    seconds: float
    reused: bool


Follower = Callable[[Artifact], AbstractContextManager[Callable[[Artifact], None]]]
_follower: ContextVar[Follower | None] = ContextVar("follower", default=None)


@contextmanager
def followed_by(follower: Follower) -> Iterator[None]:
    """Let `follower` see each artifact that is made in the block; see `making`."""
    token = _follower.set(follower)
    try:
        yield
    finally:
        _follower.reset(token)


def making(artifact: Artifact) -> AbstractContextManager[Callable[[Artifact], None]]:
    """Return a context in which an artifact is made; its value is called with the artifact as it came out."""
    follower = _follower.get()
    return nullcontext(lambda _: None) if follower is None else follower(artifact)


_found: ContextVar[dict[str, Made] | None] = ContextVar("found", default=None)


@contextmanager
def looked_at_once() -> Iterator[None]:
    """Keep what `remembered` found for the length of the block: a pipeline asks for features often."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def remembered(key: str, make: Callable[[], Made]) -> Made:
    """Return what `make` returns; inside `looked_at_once` call `make` once a key, and return the same later."""
    found = _found.get()
    if found is None:
        return make()
    if key in found:
        return replace(found[key], reused=True)
    found[key] = make()
    return found[key]


def once(
    artifact: Artifact,
    file: AnyPath,
    make: Callable[[float], Manifest],
    *,
    beside: Sequence[AnyPath] = (),
    alone_in: Workspace | None = None,
) -> Made:
    """Make the artifact unless its file is committed already; return it with the rows that were committed.

    Args:
        artifact: what is made.
        file: the artifact's path, or the file in it that is committed last.
        make: commits the file and returns its manifest; it is given the monotonic time at which the work began.
        beside: files without which the artifact has to be made again.
        alone_in: a workspace in which one process at a time makes this artifact while the others wait for it, for what
            costs much.
    """

    def manifest_of_all() -> Manifest | None:
        return committed(file, artifact.key) if all(committed(each, artifact.key) for each in beside) else None

    with _sole_maker(alone_in, artifact, lambda: manifest_of_all() is not None) if alone_in else nullcontext():
        manifest = manifest_of_all()
        reused = manifest is not None
        if manifest is None:
            with making(artifact) as is_there:
                manifest = make(time.monotonic())
                is_there(replace(artifact, rows=manifest.rows))
    return Made(replace(artifact, rows=manifest.rows), manifest.seconds, reused)


def _sole_maker(workspace: Workspace, artifact: Artifact, is_made: Callable[[], bool]) -> AbstractContextManager[None]:
    """Let one process at a time into the block, and say why a process waits."""

    def waiting(owner: str) -> None:
        what = f"{artifact.name} {artifact.key}"
        log.info("%s: %s makes it already; waiting for it", what, owner)
        console.print(f"{what}: {owner} makes it already; waiting for it", highlight=False, soft_wrap=True)

    return lease.sole_maker(workspace, artifact.key, is_made, waiting)
