"""The command by which a monitoring system watches a workspace."""

from __future__ import annotations

from typing import Annotated

import typer

from fastgda_core.extras import require_extra
from flows.commands.options import DEFAULT_WORKSPACE, WorkspaceOption


def metrics(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 9464,
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
) -> None:
    """Prometheus metrics of all runs, from the workspace alone, at http://HOST:PORT/metrics; see docs/monitoring.md.

    Example: `fastgda metrics --once`
    """
    require_extra("metrics", "prometheus_client")
    from storage_schemas.workspace import Workspace
    from tasks.watching.metrics_exporter import exposition, serve

    place = Workspace.at(workspace)
    if once:
        print(exposition(place), end="")
    else:
        serve(place, host, port)
