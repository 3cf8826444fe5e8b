"""Summaries of finished pipelines on disk: one a configuration's name, replaced by each later one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas.files import read_if_there, write_atomically
from storage_schemas.workspace import Workspace


class MadeRecord(BaseModel):
    """An artifact that a pipeline made: its name for people, input key, path from the workspace, rows, seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    key: str
    path: str
    rows: int
    seconds: float


class FinishedRecord(BaseModel):
    """`finished/<configuration's name>.json`: the newest summary of a pipeline, and the state that it holds for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: str = Field(description="stamp of everything that the pipeline read")
    published: int = Field(description="number of the version that was published when it ended")
    listings: dict[str, str] = Field(description="hash of the files of each artifact, by its path")
    run: str
    made: list[MadeRecord]
    refused: str


def read_finished(workspace: Workspace, name: str) -> FinishedRecord | None:
    """Return the summary of a configuration's pipeline; None where there is none that this release can read."""
    content = read_if_there(workspace.finished(name))
    if content is None:
        return None
    try:
        return FinishedRecord.model_validate_json(content)
    except ValidationError:
        return None


def write_finished(workspace: Workspace, name: str, record: FinishedRecord) -> None:
    """Replace the summary of a configuration's pipeline."""
    write_atomically(workspace.finished(name), record.model_dump_json(indent=2).encode() + b"\n")
