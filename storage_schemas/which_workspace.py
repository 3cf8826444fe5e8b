"""The workspace of a command that names none, and commands that a person can paste in the current folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from storage_schemas.errors import StoreError
from storage_schemas.workspace import Workspace

ENVIRONMENT = "FASTGDA_WORKSPACE"
_USUAL = (Path("workspace"), Path("demo", "workspace"))


def default_location() -> str:
    """Find the workspace of the current folder: the folder itself where it is one, or `workspace` or `demo/workspace`.

    Raises:
        StoreError: neither of the two is one, or both are.
    """
    if _is_workspace(Path()):
        return "."
    found = [str(folder) for folder in _USUAL if _is_workspace(folder)]
    if len(found) == 1:
        return found[0]
    places = f"two ({' and '.join(found)})" if found else f"none (looked at {', '.join(map(str, (Path(), *_USUAL)))})"
    raise StoreError(
        f"which workspace? {Path.cwd()} has {places}: name one with --workspace PATH, or with -c CONFIG the one of a "
        "config"
    )


def _is_workspace(folder: Path) -> bool:
    """Return whether a pipeline or an import wrote there; other programs have folders named `runs`, too."""
    ours = ("current.json", "runs/*/run.json", "samples/*/samples.parquet")
    return any(next(folder.glob(pattern), None) for pattern in ours)


def command(workspace: Workspace, text: str) -> str:
    """Return `fastgda TEXT` in backticks, with the workspace where the command alone would ask another one."""
    return f"`fastgda {text}{option(workspace)}`"


def option(workspace: Workspace) -> str:
    """Return ` --workspace PATH` for a shell; empty where a command in the current folder asks this one anyway."""
    try:
        if Workspace.at(os.environ.get(ENVIRONMENT) or default_location()).root == workspace.root:
            return ""
    except StoreError:
        pass  # a command here has to name one
    return f" --workspace {shlex.quote(_shortest(workspace))}"


def _shortest(workspace: Workspace) -> str:
    """Return the workspace's location, relative to the current folder where that is shorter."""
    location = str(workspace.root)
    return min(os.path.relpath(location), location, key=len) if isinstance(workspace.root, Path) else location
