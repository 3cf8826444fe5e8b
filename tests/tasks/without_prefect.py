"""Flows and tasks as plain functions, and a task runner that makes parts where they are submitted: without a server.

What Prefect adds (retries, states, concurrency) is tested where a server runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import pytest
from prefect import Flow, Task
from prefect.client.schemas.objects import State
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Completed, Failed

from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.execution import coordinator


@dataclass
class Here:
    """A task runner that makes a part in the caller's thread.

    deadly: parts over which its process dies, and so does all that it is given later.
    given: numbers of the parts that it was given.
    """

    deadly: set[int] = field(default_factory=set)
    given: list[int] = field(default_factory=list)
    dead: bool = False
    ended: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.ended = True

    def submit(self, task: Task[..., Any], parameters: dict[str, Any]) -> PrefectConcurrentFuture[Any]:
        self.given.append(parameters["number"])
        wrapped: Future[State[Any]] = Future()
        if not self.dead and parameters["number"] in self.deadly:
            self.dead = True
            workspace, run = Workspace.at(parameters["location"]), parameters["run"]
            log = AttemptLog(workspace, run, worker="elsewhere:1", kind=parameters["kind"])
            log.record(parameters["number"], ShardState.running)
        if self.dead:
            wrapped.set_exception(BrokenProcessPool("a process died"))
        else:
            wrapped.set_result(_ended(task, parameters))
        return PrefectConcurrentFuture(uuid4(), wrapped)


def _ended(task: Task[..., Any], parameters: dict[str, Any]) -> State[Any]:
    try:
        made = task.fn(**parameters)
    except Exception as error:
        return Failed(data=error)
    return made if isinstance(made, State) else Completed(data=made)


def made_here(patch: pytest.MonkeyPatch, *, deadly: tuple[int, ...] = ()) -> list[Here]:
    """Every runner that a coordinator starts from now on."""
    started: list[Here] = []

    def start(_config: PipelineConfig) -> Here:
        started.append(Here(set(deadly)))
        return started[-1]

    patch.setattr(coordinator, "task_runner", start)
    return started


@contextmanager
def without_prefect() -> Iterator[None]:
    """Flows and tasks that are called in the block are plain functions."""
    with pytest.MonkeyPatch.context() as patch:
        made_here(patch)
        for kind in (Flow, Task):
            patch.setattr(kind, "__call__", lambda self, *args, **kwargs: self.fn(*args, **kwargs))
        yield
