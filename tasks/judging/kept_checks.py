"""Keep what the checks of a run's teacher found, and read it."""

from __future__ import annotations

from storage_schemas.heads.records import EXACT_CHECK, CheckRecord, read_checks_record, write_checks_record
from storage_schemas.publishing.publish import update_published
from storage_schemas.snapshots.published import Published
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.teaching.run import Run


def publish_checks(run: Run, checks: list[Artifact]) -> None:
    """Add these checks to the record of a run's teacher, and show the pairs of an exact check in SQL."""
    workspace = run.workspace
    made = {check.name: CheckRecord(check.key, workspace.relative(check.path), check.rows) for check in checks}
    known = read_checks_record(workspace, run.name) | made
    write_checks_record(workspace, run.name, known)
    exact = known[EXACT_CHECK].path if EXACT_CHECK in known else None

    def with_check(before: Published | None) -> Published | None:
        return before.model_copy(update={"exact_check": exact}) if before and before.run == run.name else before

    update_published(workspace, with_check)


def read_checks(workspace: Workspace, run: str) -> list[Artifact]:
    """Return the checks of a run's teacher; none before it was judged."""
    known = read_checks_record(workspace, run)
    return [Artifact(name, check.key, workspace.file(check.path), check.rows) for name, check in known.items()]
