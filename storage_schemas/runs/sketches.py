"""Sketches that runs keep of their samples' gradients: how they were chosen, and how many are there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas.commit import MANIFEST
from storage_schemas.errors import StoreError
from storage_schemas.files import read_if_there
from storage_schemas.listings import list_folder
from storage_schemas.runs.liveness import read_assignment
from storage_schemas.workspace import Workspace

SKETCH_FILE = "sketch.json"


class SketchRecord(BaseModel):
    """`sketch.json` beside a sketch basis: what is kept of a gradient."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: str = Field(description="principal: directions among coordinates of the Fisher's eigenbasis")
    size: int = Field(description="numbers of one sketch")
    coordinates: int = Field(description="of the eigenbasis, that sketches are made from")
    coordinates_energy: float = Field(description="share of all coordinates' energy that these hold")
    directions_energy: float = Field(description="share of the pilot's squared length in these that the sketches hold")


def sketch_rows(workspace: Workspace, runs: Iterable[str]) -> Iterator[dict[str, object]]:
    """Yield a row of the table `sketches` for each of these runs whose sketches are begun, from listings alone."""
    for run in runs:
        try:
            stages = read_assignment(workspace, run).stages
        except (StoreError, ValidationError):
            continue  # imported, or another release's
        if "sketches" not in stages or "sketch basis" not in stages:
            continue
        content = read_if_there(workspace.file(stages["sketch basis"].path) / SKETCH_FILE)
        if content is None:
            continue
        record, planned = SketchRecord.model_validate_json(content), stages["sketches"]
        listing = list_folder(workspace.file(planned.path))
        done = [entry.size for name, entry in listing.items() if f"{name}{MANIFEST}" in listing]
        yield {
            "run": run,
            **record.model_dump(),
            "samples": planned.rows,
            "parts": planned.parts,
            "done": len(done),
            "bytes": sum(done),
            "path": planned.path,
        }
