"""Rivals of a run: the runs that other teachers made of its samples and queries, for the judges."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from storage_schemas.errors import StoreError
from storage_schemas.files import read_if_there, write_changed
from storage_schemas.workspace import Workspace


class RivalRecord(BaseModel):
    """One rival: where its scores are, or why there are none."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    run: str = Field(default="", description="that scored it; empty where it was refused before it was planned")
    snapshot: str = Field(default="", description="of its rank labels; empty where it has none")
    failed: str = Field(default="", description="why it has no scores, in words")


class _Rivals(RootModel[dict[str, RivalRecord]]):
    """`runs/<run>/rivals.json`: the rivals of a run by the names of their rows."""


def read_rivals(workspace: Workspace, run: str) -> dict[str, RivalRecord]:
    """Read the rivals of a run by name, in the order of its configuration; none before it was judged.

    Raises:
        StoreError: the file is damaged.
    """
    path = workspace.rivals(run)
    try:
        return _Rivals.model_validate_json(read_if_there(path) or b"{}").root
    except ValidationError:
        raise StoreError(f"{path} is damaged: delete it, and `fastgda judge CONFIG` makes it again") from None


def write_rivals(workspace: Workspace, run: str, rivals: dict[str, RivalRecord]) -> None:
    """Replace the record of a run's rivals."""
    write_changed(workspace.rivals(run), _Rivals(rivals).model_dump_json(indent=2).encode() + b"\n")
