"""Commands on a DuckLake: score shards registered in a catalog that many hosts share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows.commands.options import DEFAULT_WORKSPACE, RunArgument, WorkspaceOption
from flows.commands.rows import (
    FormatOption,
    LimitOption,
    MemoryOption,
    OutputOption,
    StatementArgument,
    TableFormat,
    ThreadsOption,
    print_query,
)
from flows.commands.terminal import say

CatalogOption = Annotated[
    str,
    typer.Option(help="`sqlite:FILE` or `postgres:CONNECTION`; the password from PGPASSWORD.", envvar="FASTGDA_LAKE"),
]

lake_app = typer.Typer(name="lake", help="Score shards in a catalog that many hosts share.", no_args_is_help=True)


@lake_app.command()
def add(run: RunArgument, catalog: CatalogOption, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Register the committed shards of a run where they lie; again, for those that came since.

    Example: `fastgda lake add coco-2b3c4d5e6f --catalog "postgres:host=db dbname=lake"`
    """
    from storage_schemas.runs.ledger import read_run
    from storage_schemas.sql.lake import Lake
    from storage_schemas.workspace import Workspace
    from tasks.progress import stage

    place = Workspace.at(workspace)
    lake = Lake(place, catalog)
    with stage("register", read_run(place, run).shards) as advance:
        added = lake.add(run, advance=advance)
    say(f"run {run}: {added:,} shards registered")


@lake_app.command()
def remove(run: RunArgument, catalog: CatalogOption, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Take a run out of the catalog; its files stay.

    Example: `fastgda lake remove coco-2b3c4d5e6f --catalog sqlite:lake.sqlite`
    """
    from storage_schemas.sql.lake import Lake
    from storage_schemas.workspace import Workspace

    Lake(Workspace.at(workspace), catalog).remove(run)
    say(f"run {run} is out of the lake")


@lake_app.command()
def sql(
    statement: StatementArgument,
    catalog: CatalogOption,
    at: Annotated[int | None, typer.Option(min=0, help="Number of the snapshot to read; the newest.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    format: FormatOption = TableFormat.table,
    output: OutputOption = None,
    limit: LimitOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Read-only SQL over `run_scores`, `registered` and `snapshots` of the catalog.

    Example: `fastgda lake sql "SELECT run, count(*) FROM run_scores GROUP BY run" --catalog sqlite:lake.sqlite`
    """
    from storage_schemas.sql.lake import Lake
    from storage_schemas.workspace import Workspace

    def asked(text: str) -> Any:
        return Lake(Workspace.at(workspace), catalog).ask(text, at=at, memory_gigabytes=memory, threads=threads)

    print_query(asked, statement, format, output, limit)
