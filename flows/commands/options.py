"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage_schemas.which_workspace import ENVIRONMENT, default_location

if TYPE_CHECKING:
    from tasks.config.pipeline import PipelineConfig

DEMO_FOLDER = Path("demo")
DEFAULT_WORKSPACE = ""  # that of the current folder
ConfigArgument = Annotated[Path, typer.Argument(help="YAML config; see deployments/openmoji.yaml.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Runner(StrEnum):
    local = "local"
    ray = "ray"
    dask = "dask"
    pool = "pool"
    slurm = "slurm"


RunnerOption = Annotated[
    Runner | None, typer.Option(help="Where parts are made; default: execution.runner of the config.")
]


def read_config(path: Path, runner: Runner | None = None) -> PipelineConfig:
    """Read the configuration, with another runner where one is given."""
    from tasks.config.files import load_config, with_runner

    config = load_config(path)
    return with_runner(config, runner.value) if runner else config


def chosen_workspace(named: str) -> str:
    """Return the workspace that is meant: the one named, that of the config named, or the current folder's."""
    if not named:
        location = default_location()
        typer.echo(f"workspace {location} (-c CONFIG or --workspace PATH name another one)", err=True)
        return location
    if "://" not in named and (Path(named).is_file() or named.endswith((".yaml", ".yml"))):
        from tasks.config.document import workspace_of

        return workspace_of(Path(named))
    return named


def workspace_option(callback: Callable[[str], str] | None = None) -> Any:
    """Return the option that names a workspace; `callback` makes its location of what was given."""
    return typer.Option(
        "--workspace",
        "--config",
        "-c",
        metavar="PATH",
        help="The workspace, as a folder, a URL, or a config whose workspace it is.",
        show_default="that of the current folder: itself, ./workspace or ./demo/workspace",
        envvar=ENVIRONMENT,
        callback=callback,
    )


WorkspaceOption = Annotated[str, workspace_option(chosen_workspace)]


def trimmed(given: str) -> str:
    """Return a name without the blanks that a shell's $(...) leaves around another program's output."""
    return given.strip()


RunArgument = Annotated[
    str,
    typer.Argument(help='The run\'s name; see `fastgda sql "SELECT run, state FROM runs"`.', callback=trimmed),
]
