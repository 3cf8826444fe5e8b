"""Outcomes of making the parts of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace
from tasks.parts import RunRefused

__all__ = ["Failure", "Outcome", "PartHangs", "RunCancelled", "RunIncomplete", "RunRefused"]


@dataclass(frozen=True)
class Failure:
    """A part that is not there after all retries, and why."""

    kind: str
    number: int
    error_class: str
    message: str

    @classmethod
    def of(cls, kind: str, number: int, error: BaseException) -> Failure:
        return cls(kind, number, type(error).__name__, str(error))

    def __str__(self) -> str:
        return f"{self.kind} {self.number:05d}: {self.error_class}: {self.message}"


@dataclass
class Outcome:
    """The end of a fan-out: what failed for good, whether somebody stopped it, whether a worker process died."""

    failures: dict[int, Failure] = field(default_factory=dict)
    stopped: bool = False
    worker_lost: bool = False


class PartHangs(RuntimeError):
    """A part does not come back, in a thread of the process that coordinates the run: no thread can be ended."""


class RunIncomplete(RuntimeError):
    """Some parts failed after their retries; the finished ones are kept."""

    def __init__(self, workspace: Workspace, run: str, kind: str, count: int, failures: list[Failure]) -> None:
        self.run, self.failures = run, failures
        shown = [str(failure) for failure in failures[:20]]
        more = [f"and {len(failures) - 20} more"] if len(failures) > 20 else []
        lines = [
            f"run {run}: {len(failures)} of {count} parts of {kind!r} failed; "
            f"{command(workspace, f'retry {run}')} computes only these",
            *shown,
            *more,
        ]
        super().__init__("\n".join(lines))


class RunCancelled(RuntimeError):
    """The run was stopped as somebody asked; what is finished is kept."""
