"""The samples that were indexed last, which SQL shows before a run of them is published; and tables that grew."""

from __future__ import annotations

import functools

from pydantic import BaseModel, ConfigDict, ValidationError

from storage_schemas import tables
from storage_schemas.files import AnyPath, read_whole, write_changed
from storage_schemas.workspace import Workspace


class Indexed(BaseModel):
    """`samples/newest.json`: two tables, by their paths relative to the workspace."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: str
    rejected_samples: str


def write_indexed(workspace: Workspace, samples: AnyPath, rejected_samples: AnyPath) -> None:
    """Note which samples were indexed last, also where they had been indexed before."""
    indexed = Indexed(samples=workspace.relative(samples), rejected_samples=workspace.relative(rejected_samples))
    write_changed(workspace.newest_samples, indexed.model_dump_json(indent=2).encode() + b"\n")


def read_indexed(workspace: Workspace) -> Indexed | None:
    """Read which samples were indexed last; None where no release that notes it indexed any, or they are gone."""
    try:
        indexed = Indexed.model_validate_json(read_whole(workspace.newest_samples))
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    there = all(workspace.file(path).exists() for path in (indexed.samples, indexed.rejected_samples))
    return indexed if there else None


@functools.lru_cache(maxsize=64)
def continues(longer: AnyPath, shorter: AnyPath) -> bool:
    """Return whether a train_id of one table of samples means the same image in another, which may have more behind.

    It may be cached, as a table of samples is never changed.
    """
    if longer == shorter:
        return True
    columns = ["key", "image_sha256"]
    try:
        one, two = (tables.read(path, tables.SAMPLES, columns=columns) for path in (longer, shorter))
    except FileNotFoundError:
        return False
    return bool(one.slice(0, two.num_rows).equals(two))
