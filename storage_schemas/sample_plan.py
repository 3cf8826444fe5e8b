"""How the tars of a data set are cut into parts that are read and checked alone, and which parts are there.

A part's file is named after a key of its own: of the tars in it, and of nothing else. So when one tar changes, the
parts of the others are found again.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from storage_schemas.commit import Manifest
from storage_schemas.files import read_if_there, write_changed
from storage_schemas.listings import list_folder, listed_manifest
from storage_schemas.workspace import Workspace

KIND = "samples"  # of the parts, in files of a run


class Piece(BaseModel):
    """A tar, or one of several equal shares of its bytes; of a caption file, of its images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: str = Field(description="path of the tar")
    share: int = Field(default=0, ge=0, description="which share, from 0")
    of: int = Field(default=1, ge=1, description="how many shares there are")


class SamplePart(BaseModel):
    """Some tars, or a share of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(description="hash of the tars' places, sizes and times, and of the rules by which they are read")
    size: int = Field(ge=0, description="bytes, about")
    pieces: tuple[Piece, ...]


class SamplePlan(BaseModel):
    """`samples/<key>/plan.json`: the parts, in the order of their samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: tuple[SamplePart, ...]


def write_sample_plan(workspace: Workspace, key: str, plan: SamplePlan) -> None:
    """Write the plan of a data set's tars, by the key of its index."""
    write_changed(workspace.sample_plan(key), plan.model_dump_json().encode() + b"\n")


def read_sample_plan(workspace: Workspace, key: str) -> SamplePlan | None:
    """Read the plan of a data set's tars; None where an earlier release read them, or nobody has begun."""
    content = read_if_there(workspace.sample_plan(key))
    return None if content is None else SamplePlan.model_validate_json(content)


def committed_sample_parts(workspace: Workspace, plan: SamplePlan) -> Mapping[int, Manifest]:
    """Return the manifests of the parts that are there, by number, from one listing."""
    listing = list_folder(workspace.sample_parts)
    there = {}
    for number, part in enumerate(plan.parts):
        path = workspace.sample_part(part.key)
        manifest = listed_manifest(path, listing) if path.name in listing else None
        if manifest is not None and manifest.input_key == part.key and manifest.size == listing[path.name].size:
            there[number] = manifest
    return there
