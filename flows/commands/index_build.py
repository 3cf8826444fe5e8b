"""Commands that make index versions: `fastgda index build` and `fastgda index add`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import DEFAULT_WORKSPACE, ConfigArgument, WorkspaceOption, read_config
from flows.commands.own_server import run_flow, start_server
from flows.commands.terminal import say

if TYPE_CHECKING:
    from storage_schemas.heads.records import IndexRecord
    from tasks.artifact import Made


def build(
    config: ConfigArgument,
    head: Annotated[str | None, typer.Option(help="Version of the head; default: the newest.")] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Make these parts alone, 7 or 0-2,5: one worker of several; without it the rest, merged."),
    ] = None,
) -> None:
    """Build the search index of a head; it is served once `fastgda evaluate` promotes it.

    What kind of index it is, and why, and how many of the true neighbours it finds, is printed and kept with it.

    Example: `fastgda index build my_config.yaml`
    """
    from tasks.config.packages import require_packages

    checked = read_config(config)
    require_packages(checked)
    start_server()
    from flows.indexing import build_index_parts, rebuild_index

    if part is not None:
        count = run_flow(build_index_parts, checked, part, head)
        say(f"parts {part} of {count} are there: `fastgda index build {shlex.quote(str(config))}` merges them")
        return
    built = run_flow(rebuild_index, checked, head)
    again = f"`fastgda evaluate {shlex.quote(str(config))}`"
    say_index(built, f"{again} measures and promotes it")


def say_index(built: Made, then: str) -> None:
    """Print what an index is, why, how good, and what to do with it."""
    from storage_schemas.heads.records import read_index_record

    record = read_index_record(built.artifact.path)
    say(f"index {built.artifact.key}{' (was there)' if built.reused else ''}: {then}")
    for line in described(record):
        say(f"  {line}")


def described(record: IndexRecord) -> list[str]:
    """Return what people want to know of an index, a line each."""
    lines = [f"{record.kind}: {record.reason}"]
    settings = {"nprobe": record.nprobe, "efSearch": record.ef_search, "k_factor": record.k_factor}
    lines += [", ".join(f"{name} {value:g}" for name, value in settings.items() if value is not None)]
    if record.recall_at_10 is not None and record.recall_at_100 is not None:
        found = f"recall@10 {record.recall_at_10:.3f}, recall@100 {record.recall_at_100:.3f}"
        lines.append(f"{found}, against exact search of {record.recall_of}")
        if record.target is not None and record.recall_at_100 < record.target:
            lines.append(f"below index.recall {record.target:g}: give it more memory_gb, or another kind")
    return [line for line in lines if line]


def add(
    tars: Annotated[list[Path], typer.Argument(help="WebDataset tars with the new training images and captions.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    index: Annotated[str | None, typer.Option(help="Version to add to; default: the served one.")] = None,
) -> None:
    """Add training images to an index without building it anew.

    The version that comes of it names the one that it came from; it is not served before it is promoted.

    Example: `fastgda index add new-00000.tar`
    """
    from storage_schemas.which_workspace import command
    from storage_schemas.workspace import Workspace

    start_server()
    from flows.indexing import add_to_index

    made = run_flow(add_to_index, str(workspace), [str(tar) for tar in tars], index)
    promote = command(Workspace.at(workspace), f"index promote {made.artifact.key}")
    say_index(made, f"{promote} serves it")
