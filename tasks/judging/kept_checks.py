"""Keep what the checks of a run's teacher found, and read it."""

from __future__ import annotations

import json

from storage_schemas.commit import write_atomically
from storage_schemas.publishing.publish import update_published
from storage_schemas.snapshots.published import Published
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.teaching.run import RunInputs
from tasks.watching.trust import check_paths


def publish_checks(inputs: RunInputs, checks: list[Artifact]) -> None:
    """Keep what checks of a run's teacher found beside what earlier ones did, and show checked pairs in SQL."""
    workspace = inputs.workspace
    earlier = read_checks(workspace, inputs.run)
    named = {check.name: [check.key, workspace.relative(check.path), check.rows] for check in (*earlier, *checks)}
    write_atomically(workspace.checks(inputs.run), json.dumps(named, indent=2).encode() + b"\n")
    exact = named["exact check"][1] if "exact check" in named else None

    def with_check(before: Published | None) -> Published | None:
        return before.model_copy(update={"exact_check": exact}) if before and before.run == inputs.run else before

    update_published(workspace, with_check)


def read_checks(workspace: Workspace, run: str) -> list[Artifact]:
    """What is known of a run's teacher; nothing before it was judged."""
    found = check_paths(workspace, run)
    return [Artifact(name, key, path, rows) for name, (key, path, rows) in found.items()]
