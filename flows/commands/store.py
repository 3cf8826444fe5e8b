"""Commands that look after the score store: publish, verify, retry, compact, export."""

from __future__ import annotations

import time
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.commands.options import DEFAULT_WORKSPACE, RunArgument, WorkspaceOption, trimmed
from flows.commands.terminal import out, say
from storage_schemas.which_workspace import command

ledger_app = typer.Typer(name="ledger", help="The ledger of runs and score shards.", no_args_is_help=True)


@ledger_app.command()
def rebuild(workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Write the ledger of every run anew, from its plan, manifests and attempt records.

    Example: `fastgda ledger rebuild`
    """
    from storage_schemas.runs.ledger import rebuild_ledgers
    from storage_schemas.workspace import Workspace

    started = time.monotonic()
    shards = rebuild_ledgers(Workspace.at(workspace))
    say(f"{len(shards)} runs, {sum(shards.values()):,} shards, {time.monotonic() - started:.1f} s")


def publish(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="A later run's queries replace the same queries of earlier ones.",
            callback=lambda runs: [trimmed(run) for run in runs],
        ),
    ],
    add: Annotated[bool, typer.Option("--add", help="Beside the runs that are published already.")] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Make the rows of some finished runs what readers see, in one step.

    Example: `fastgda publish --add coco-2b3c4d5e6f`
    """
    from storage_schemas.publishing.publish import publish_runs
    from storage_schemas.snapshots.snapshots import read_snapshot
    from storage_schemas.workspace import Workspace

    place = Workspace.at(workspace)
    published = publish_runs(place, runs, add=add)
    snapshot = read_snapshot(place, published.snapshot)
    say(f"published {snapshot.snapshot}: {snapshot.rows:,} rows of {snapshot.queries:,} queries")
    if published.head is None:
        say(
            "no rank head is trained on this data yet: `attribute` answers again after `fastgda train`, `index` "
            "and `evaluate`"
        )


def retract(run: RunArgument, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Take a run's rows out of what readers see; its files stay.

    Example: `fastgda retract coco-2b3c4d5e6f`
    """
    from storage_schemas.publishing.publish import retract_run
    from storage_schemas.workspace import Workspace

    published = retract_run(Workspace.at(workspace), run)
    say(f"published now: {published.snapshot}" if published else "nothing is published now")


def compact(run: RunArgument, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Write rank labels of a finished run into a few large sorted files; publishing does this too.

    Example: `fastgda compact coco-2b3c4d5e6f`
    """
    from storage_schemas.runs.ledger import read_run
    from storage_schemas.snapshots.compaction import compact as compact_run
    from storage_schemas.workspace import Workspace
    from tasks.progress import stage

    place = Workspace.at(workspace)
    with stage("rank labels", read_run(place, run).pairs) as advance:
        parts = compact_run(place, run, advance=advance)
    say(f"{sum(part.rows for part in parts):,} rows in {len(parts)} files")


def vacuum(
    hours: Annotated[float, typer.Option("--older-than", min=0.0, help="Hours; what is younger stays.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Delete score shards whose rows lie in large files, and what nothing refers to.

    Example: `fastgda vacuum --dry-run`
    """
    from storage_schemas.publishing.serving import finish_pruning
    from storage_schemas.publishing.unused_vectors import prune_vectors
    from storage_schemas.snapshots.vacuum import vacuum as vacuum_files
    from storage_schemas.workspace import Workspace

    place = Workspace.at(workspace)
    gone = vacuum_files(place, older_than=timedelta(hours=hours), dry_run=dry_run)
    if not dry_run:
        finish_pruning(place)  # that a process which died had begun
    vectors = prune_vectors(place, older_than=timedelta(hours=hours), dry_run=dry_run)
    say(f"{len(gone):,} files {'would be ' if dry_run else ''}deleted")
    if vectors:
        freed = sum(each.size for each in vectors)
        verb = "would be" if dry_run else "are"
        say(f"vectors of {len(vectors)} heads that no index names {verb} deleted, {freed:,} bytes")


def verify(workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Read every committed file and compare it with its checksum; damaged ones are quarantined. Exit code 1 then.

    Example: `fastgda verify`
    """
    from storage_schemas.audit.verify import committed_files, duplicated_pairs, take_downs_fault
    from storage_schemas.audit.verify import verify as verify_files
    from storage_schemas.runs.ledger import run_names
    from storage_schemas.workspace import Workspace
    from tasks.progress import stage

    place = Workspace.at(workspace)
    files = len(committed_files(place))
    with stage("checksums", files) as advance:
        damages = verify_files(place, advance=advance)
    twice = {run: count for run in run_names(place) if (count := duplicated_pairs(place, run))}
    unreadable = take_downs_fault(place)
    if not damages and not twice and not unreadable:
        say(f"{files:,} files are what their manifests say; every pair occurs once")
        return
    if unreadable:
        say(unreadable)
    table = Table("what is wrong")
    table.add_column("file", overflow="fold", ratio=1)
    table.add_column("moved to", overflow="fold", ratio=1)
    for damage in damages:
        table.add_row(damage.reason, damage.path, damage.moved_to)
    if damages:
        out.print(table)
    for run, count in twice.items():
        say(f"run {run}: {count:,} pairs occur more than once")
    if damages or twice:
        say(f"{command(place, 'retry RUN')} makes damaged score shards again, `fastgda run CONFIG` everything else")
    raise typer.Exit(1)


class ExportFormat(StrEnum):
    parquet = "parquet"
    datasets = "datasets"
    release = "release"


def export(
    run: RunArgument,
    output: Annotated[Path, typer.Option(help="File, or folder for `datasets`; it must not exist.")],
    format: Annotated[
        ExportFormat, typer.Option(help="One Parquet file, a Hugging Face folder, or the release's pickle.")
    ] = ExportFormat.parquet,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Export one finished run as a single file or folder for other programs.

    Example: `fastgda export coco-2b3c4d5e6f --output scores.parquet`
    """
    from storage_schemas.publishing.export import export_datasets, export_parquet
    from storage_schemas.publishing.release import export_release
    from storage_schemas.workspace import Workspace

    write = {"parquet": export_parquet, "datasets": export_datasets, "release": export_release}[format]
    write(Workspace.at(workspace), run, output)
    say(f"run {run}: {output}")


store_commands = (publish, retract, compact, vacuum, verify, export)
