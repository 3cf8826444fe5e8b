"""The command that answers over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastgda_core.errors import UsageError
from flows.commands.options import DEFAULT_WORKSPACE, DEMO_FOLDER, chosen_workspace, workspace_option
from flows.commands.terminal import say, warn

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    workspace: Annotated[str, workspace_option()] = DEFAULT_WORKSPACE,  # --demo names one as well
    demo: Annotated[bool, typer.Option("--demo", help="Serve what `fastgda demo` made in ./demo.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need --keys.")] = LOOPBACK[0],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: one that is free.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer; each loads the models.")] = 1,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, as `fastgda keys add` makes it.")] = None,
    audit: Annotated[
        Path | None,
        typer.Option(help="File that gets a line for each call of an administrator.", show_default="KEYS.audit.jsonl"),
    ] = None,
    limits: Annotated[Path | None, typer.Option(help="YAML file of limits; see docs/serving.md.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="Host name to be asked by; more than once.")] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Origin whose pages may ask; more than once.")] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Without the page at /: for programs alone.")] = False,
) -> None:
    """Answer over HTTP: questions, images, shares, index versions, and a page at /; see docs/serving.md.

    Example: `fastgda serve --demo`
    """
    if host not in LOOPBACK and keys is None:
        raise UsageError(
            f"--host {host} lets other machines ask, and there are no keys: `fastgda keys add NAME --keys FILE`, then "
            "--keys FILE"
        )
    # Before torch and FAISS are imported: threads of theirs in every thread of ours would stand in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tasks.serving.http.settings import Limits, ServiceSettings, read_limits

    settings = ServiceSettings(
        workspace=_demo_workspace() if demo else chosen_workspace(workspace),
        host=host,
        port=port,
        workers=workers,
        keys=None if keys is None else str(keys.resolve()),
        audit=None if audit is None else str(audit.resolve()),
        hosts=_names(host, name or []),
        cors=cors or [],
        page=not no_page,
        limits=Limits() if limits is None else read_limits(limits),
    )
    from tasks.serving.http.server import bind, check, run

    if missing := check(settings):
        warn(f"not ready yet: {missing}")
    socket = bind(settings)
    if keys is None:
        say("no --keys: whoever is on this machine may ask, nobody may change anything")
    say(f"http://{'[::1]' if ':' in host else host}:{socket.getsockname()[1]}/  (Ctrl-C ends it)")
    run(settings, socket)


def _names(host: str, named: list[str]) -> list[str]:
    """Return the host names that requests may have: on loopback its own, else those that were named, or any."""
    return [*(["localhost", "127.0.0.1", "[::1]"] if host in LOOPBACK else []), *(each.lower() for each in named)]


def _demo_workspace() -> str:
    workspace = DEMO_FOLDER / "workspace"
    if not (workspace / "current.json").exists():
        raise UsageError(f"{workspace} holds no finished demo: run `make demo` or `fastgda demo` here first")
    return str(workspace)
