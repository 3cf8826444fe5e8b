"""Messages between a run's processes while it is under way: assignment, signs of life, a wish to stop.

They are small files in the run's folder, each written by one side only and replaced whole, so that any number of hosts
can look at them, whether or not a Prefect server runs.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas.commit import input_key
from storage_schemas.errors import StoreError
from storage_schemas.files import is_there, matching, read_if_there, read_whole, remove, write_atomically, write_changed
from storage_schemas.workspace import Workspace

BEAT_SECONDS = 5.0  # between two signs of life of a worker


class PartsRecord(BaseModel):
    """One kind of part that a run is made of: where its files lie and what they depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    path: str = Field(description="relative to the workspace")
    rows: int = Field(ge=0)
    parts: int = Field(default=0, ge=0, description="of the stages before the scores; 0 in an earlier release")


class Assignment(BaseModel):
    """`runs/<run>/assignment.json`: all that a worker needs to know of a run beside its plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    config: dict[str, object] = Field(description="the pipeline's configuration")
    model_hash: str
    checkpoint_hashes: tuple[str, ...] = Field(default=(), description="of teacher.checkpoints, in order")
    stages: dict[str, PartsRecord]
    execution: dict[str, object] = Field(default_factory=dict, description="how its coordinator carries it out")
    generation: int = Field(default=0, description="grows when finished parts were thrown away to be made again")
    origin: str = Field(default="", description="the Prefect flow run of the coordinator")

    @property
    def key(self) -> str:
        """A key that changes with anything that changes a worker's work."""
        return input_key(self.run, self.config, self.model_hash, self.stages, self.generation)


def is_preparation(workspace: Workspace, run: str) -> bool:
    """Return whether this is no run, but work that is done before one is planned: workers have it, and no plan."""
    return not is_there(workspace.run(run)) and is_there(workspace.assignment(run))


def preparation_names(workspace: Workspace) -> list[str]:
    """Return all preparations, the one that was begun last at the end."""
    folders = [folder.name for folder in matching(workspace.runs, "*")]
    found = [name for name in folders if is_preparation(workspace, name)]
    return sorted(found, key=lambda name: workspace.assignment(name).stat().st_mtime)


class RunRequest(StrEnum):
    """A wish to a run's processes."""

    pause = "pause"
    cancel = "cancel"


class Control(BaseModel):
    """`runs/<run>/control.json`: somebody wants the run's workers to stop; `fastgda resume` removes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wish: RunRequest
    at: datetime


class Beat(BaseModel):
    """`runs/<run>/workers/<worker>.json`: a sign of life of a worker process, with the part that it is at.

    A reader on another host goes by `beat`, which grows, and not by the clock.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    worker: str = Field(description="host:process")
    job: str = Field(default="", description="the Prefect flow run that it works in")
    slurm: str = Field(default="", description="its task in Slurm, as 12_3")
    device: str = ""
    beat: int = Field(ge=0, description="how often it has told")
    at: datetime = Field(description="by the worker's clock, UTC")
    kind: str = Field(default="", description="kind of the part that it is at; empty between parts")
    number: int = Field(default=-1, description="number of that part")
    part_seconds: float = Field(default=0.0, description="how long it has been at it")
    parts: int = Field(default=0, description="finished by this process")
    rows: int = Field(default=0, description="in them")
    seconds: float = Field(default=0.0, description="spent on them")
    device_memory: int = Field(default=0, description="bytes of device memory held at most")
    out_of_memory: int = Field(default=0, description="how often a micro-batch was halved")
    ended: bool = Field(default=False, description="it has left by itself")


def write_assignment(workspace: Workspace, assignment: Assignment) -> None:
    """Replace the run's assignment where it differs."""
    write_changed(workspace.assignment(assignment.run), assignment.model_dump_json(indent=2).encode() + b"\n")


def read_assignment(workspace: Workspace, run: str) -> Assignment:
    """Read the run's assignment.

    Raises:
        StoreError: the run has none, as one that was imported.
    """
    content = read_if_there(workspace.assignment(run))
    if content is None:
        raise StoreError(f"run {run} was imported or is of an earlier release: nothing can be computed for it")
    return Assignment.model_validate_json(content)


def ask(workspace: Workspace, run: str, wish: RunRequest) -> None:
    """Tell the run's workers and its coordinator to pause or to stop."""
    control = Control(wish=wish, at=datetime.now(UTC))
    write_atomically(workspace.control(run), control.model_dump_json().encode() + b"\n")


def asked(workspace: Workspace, run: str) -> RunRequest | None:
    """Return what the run's processes are asked for at this moment; None where nothing is."""
    content = read_if_there(workspace.control(run))
    return None if content is None else Control.model_validate_json(content).wish


def withdraw(workspace: Workspace, run: str) -> None:
    """Withdraw the wish to pause or to stop, so that the run may go on."""
    if is_there(workspace.control(run)):
        remove(workspace.control(run))


def write_beat(workspace: Workspace, run: str, beat: Beat) -> None:
    """Replace the worker's sign of life."""
    name = "".join(letter if letter.isalnum() else "-" for letter in beat.worker)
    write_atomically(workspace.beats(run) / f"{name}.json", beat.model_dump_json().encode() + b"\n")


def read_beats(workspace: Workspace, run: str) -> list[Beat]:
    """Read the last beat of every process that ever worked on the run."""
    found = []
    for path in matching(workspace.beats(run), "*.json"):
        try:
            found.append(Beat.model_validate_json(read_whole(path)))
        except (FileNotFoundError, ValidationError):
            continue
    return found


def process_lives(worker: str) -> bool:
    """Return whether the process behind host:pid may still run; a process on another host is taken to run."""
    host, _, pid = worker.rpartition(":")
    if host != os.uname().nodename or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
