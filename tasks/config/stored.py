"""Read configurations that runs of this or an earlier release stored, as this release's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from fastgda_core.errors import UsageError
from storage_schemas.runs.ledger import read_run
from storage_schemas.runs.liveness import is_preparation, read_assignment
from storage_schemas.workspace import Workspace
from tasks.config.faults import faults
from tasks.config.pipeline import PipelineConfig
from tasks.config.section import Section
from tasks.progress import console

# Settings that earlier releases did not have are missing in what they stored; today's defaults would make other runs.
_IN_FORCE_BEFORE: dict[str, dict[str, object]] = {
    "features": {"centre": False},
    "curvature": {"importance": False},
    "queries": {"twins": 0},
}

AnySection = TypeVar("AnySection", bound=Section)


def config_of(location: str, run: str) -> PipelineConfig:
    """Return the configuration of a run or preparation in the folder given.

    The folder may be mounted elsewhere than when it was planned.

    Raises:
        UsageError: the run was imported, and no teacher of this workspace scored it; or this release cannot carry it
            out.
    """
    workspace = Workspace.at(location)
    if not is_preparation(workspace, run) and "teacher" not in read_run(workspace, run).config:
        raise UsageError(f"run {run} was imported: its scores cannot be made again here; import its file once more")
    found = read_assignment(workspace, run)
    stored: dict[str, Any] = found.config
    sections = {name: {**before, **stored.get(name, {})} for name, before in _IN_FORCE_BEFORE.items()}
    document = {**stored, **sections, "execution": found.execution, "workspace": str(workspace.root)}
    config, unknown = lifted(PipelineConfig, document, f"run {run}")
    if unknown:
        console.print(
            f"run {run} was planned by another release; this one does not know {', '.join(unknown)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return config


def lifted(model: type[AnySection], document: Mapping[str, Any], owner: str) -> tuple[AnySection, list[str]]:
    """Return a stored configuration or section, and the fields in it that this release does not know and leaves out.

    Args:
        model: the class of the configuration or section in this release.
        document: as it was stored; fields that are missing take their default.
        owner: whose configuration it is, for a message.

    Raises:
        UsageError: a field that this release knows has a value that it does not take.
    """
    rest: dict[str, Any] = copy.deepcopy(dict(document))
    try:
        return model.model_validate(rest), []
    except ValidationError as error:
        strange = [detail["loc"] for detail in error.errors() if detail["type"] == "extra_forbidden"]
    unknown = [_drop(rest, location) for location in strange]
    try:
        return model.model_validate(rest), unknown
    except ValidationError as error:
        told = faults(error, model)
        raise UsageError("\n".join(f"{owner}, which another release stored: {fault}" for fault in told)) from None


def _drop(document: Any, location: tuple[int | str, ...]) -> str:
    """Take out the field at a location, and return its dotted name.

    Steps of the location through the kinds of a union are not in the document.
    """
    path = []
    for step in location[:-1]:
        if isinstance(step, int) or step in document:
            document = document[step]
            path.append(str(step))
    del document[location[-1]]
    return ".".join([*path, str(location[-1])])
