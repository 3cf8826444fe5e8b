"""Orders to processes that wait in a queue of a cluster, and what their coordinator last saw of the queue."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from storage_schemas.files import is_there, read_if_there, remove, write_changed
from storage_schemas.workspace import Workspace


class Order(BaseModel):
    """`runs/<run>/order.json`: the parts that are to be made now; without it there is nothing to do."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    assignment: str = Field(description="key of the run's assignment")
    kind: str = Field(description="of the parts")
    numbers: str = Field(description="of the parts, as 0-2,5; those that are there already may be among them")
    given_by: str = Field(description="the coordinator: host:process")
    timeout: float | None = Field(default=None, description="seconds that one part may take; none where not known")


class QueuedTask(BaseModel):
    """A task of a job array, by its id (`12_3`), its state as Slurm has it, and why it waits or how it ended."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    state: str
    reason: str = ""


class SlurmQueue(BaseModel):
    """`runs/<run>/slurm.json`: the tasks of a run that wait or run in Slurm."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = Field(description="of the jobs in Slurm")
    logs: str = Field(description="folder of the tasks' output")
    at: datetime
    tasks: tuple[QueuedTask, ...] = ()

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the tasks of each job array by their state."""
        found: dict[str, dict[str, int]] = {}
        for task in self.tasks:
            states = found.setdefault(task.task.partition("_")[0], {})
            states[task.state] = states.get(task.state, 0) + 1
        return found


def write_order(workspace: Workspace, run: str, order: Order) -> None:
    """Replace the run's order where it differs."""
    write_changed(workspace.order(run), order.model_dump_json().encode() + b"\n")


def read_order(workspace: Workspace, run: str) -> Order | None:
    """Read what is to be made now; None where nothing is."""
    content = read_if_there(workspace.order(run))
    return None if content is None else Order.model_validate_json(content)


def withdraw_order(workspace: Workspace, run: str) -> None:
    """Withdraw the run's order: processes that wait for work end."""
    if is_there(workspace.order(run)):
        remove(workspace.order(run))


def write_queue(workspace: Workspace, run: str, queue: SlurmQueue) -> None:
    """Replace what is known of the run's tasks in Slurm."""
    write_changed(workspace.slurm(run), queue.model_dump_json().encode() + b"\n")


def read_queue(workspace: Workspace, run: str) -> SlurmQueue | None:
    """Read what was last known of the run's tasks in Slurm; None where it has had none."""
    content = read_if_there(workspace.slurm(run))
    return None if content is None else SlurmQueue.model_validate_json(content)
