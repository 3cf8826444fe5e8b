"""Commands that watch, pause and stop runs."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.live import Live

from flows.commands.options import DEFAULT_WORKSPACE, JsonOption, RunArgument, WorkspaceOption, trimmed
from flows.commands.terminal import out, say
from storage_schemas.errors import StoreError
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace

WATCH_SECONDS = 2.0


def status(
    run: Annotated[
        str | None,
        typer.Argument(help="The run; default: the one planned last.", callback=lambda run: run and trimmed(run)),
    ] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until the run is over.")] = False,
) -> None:
    """Progress, speed, time left, device-hours, workers, failures; from the workspace alone, no server is needed.

    Example: `fastgda status`
    """
    from tasks.watching.run_status import RunStatus, latest_run, run_status
    from tasks.watching.status_text import status_table

    place = Workspace.at(workspace)
    name = run or latest_run(place)

    def now() -> RunStatus:
        return run_status(place, name)

    if as_json:
        print(json.dumps(now().as_json(), indent=2))
    elif not watch:
        out.print(status_table(now()), highlight=False)
    else:
        with Live(console=out, auto_refresh=False) as live:
            while True:
                status_now = now()
                live.update(status_table(status_now), refresh=True)
                if status_now.state not in ("running", "paused", "planned"):
                    break
                time.sleep(WATCH_SECONDS)


def pause(run: RunArgument, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Stop a run's workers at their next micro-batch; its coordinator waits.

    Example: `fastgda pause openmoji-1b2c3d4e5f`
    """
    place = _ask(run, workspace, "pause")
    say(f"asked; {command(place, f'resume {run}')} lets it go on")


def cancel(run: RunArgument, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Stop a run's workers at their next micro-batch, and its coordinator; what is finished is kept.

    Example: `fastgda cancel openmoji-1b2c3d4e5f`
    """
    from storage_schemas.runs.orders import read_queue

    place = _ask(run, workspace, "cancel")
    queue = read_queue(place, run)
    if queue is not None and queue.tasks:
        from tasks.execution.slurm_commands import called_off

        # Its coordinator does so, too, where it lives.
        why = called_off(queue.name)
        say(
            f"{why}; `scancel --name={queue.name}` on a login node takes them off"
            if why
            else "Slurm's queue is cleared"
        )
    say(f"asked; {command(place, f'retry {run}')} would go on")


def _ask(run: str, workspace: str, wish: str) -> Workspace:
    from storage_schemas.runs.ledger import check_known
    from storage_schemas.runs.liveness import RunRequest, ask

    place = Workspace.at(workspace)
    check_known(place, run)
    ask(place, run, RunRequest(wish))
    return place


def resume(run: RunArgument, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Let a paused run go on.

    Example: `fastgda resume openmoji-1b2c3d4e5f`
    """
    from storage_schemas.runs.ledger import check_known
    from storage_schemas.runs.liveness import RunRequest, asked, withdraw

    place = Workspace.at(workspace)
    check_known(place, run)
    if asked(place, run) != RunRequest.pause:
        raise StoreError(f"run {run} is not paused; {command(place, f'status {run}')} says how it stands")
    withdraw(place, run)
    say(f"it goes on, if its coordinator still waits; otherwise {command(place, f'retry {run}')}")


watch_commands = (status, pause, resume, cancel)
