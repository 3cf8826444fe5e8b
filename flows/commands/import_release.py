"""`fastgda import-release`: the FastGDA release's folder, or one of its pickles of scores, into a workspace."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import DEFAULT_WORKSPACE, WorkspaceOption
from flows.commands.terminal import say
from storage_schemas.which_workspace import command

if TYPE_CHECKING:
    from storage_schemas.workspace import Workspace
    from tasks.importing.release import Imported

_OF_FOLDER, _OF_PICKLE = "The release's folder", "One pickle of it"


def import_release(
    release: Annotated[
        Path,
        typer.Argument(help="The release's folder `data/coco`, or one of its pickles of scores alone."),
    ],
    name: Annotated[str, typer.Option(help="Name of the runs.")] = "release",
    config_file: Annotated[Path, typer.Option(help="Configuration to write.", rich_help_panel=_OF_FOLDER)] = Path(
        "release.yaml"
    ),
    space: Annotated[
        str | None,
        typer.Option(help="Its feature space; default: that of the best head there is.", rich_help_panel=_OF_FOLDER),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(
            help="Folder of Stable Diffusion 2.1-base, to score new queries with.", rich_help_panel=_OF_FOLDER
        ),
    ] = None,
    encoders: Annotated[
        Path | None,
        typer.Option(
            envvar="FASTGDA_ENCODERS",
            help="Folder with the weights of encoders: dino, clip, clip_text; default: the hub's.",
            rich_help_panel=_OF_FOLDER,
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="The method that made its scores.", rich_help_panel=_OF_PICKLE)
    ] = "abu_plus",
    query_ids: Annotated[
        Path | None,
        typer.Option(
            help="Text file, the query_id of a row on each line; default: q00000, q00001, ...",
            rich_help_panel=_OF_PICKLE,
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            help="Table that its train_ids number, in the workspace: samples/KEY/samples.parquet.",
            rich_help_panel=_OF_PICKLE,
        ),
    ] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """The FastGDA release as it lies on disk: scores, features, heads, model and Fisher; its pickles run nothing.

    The configuration that is written is for `fastgda evaluate`, `train`, `index build` and `curate`.

    Example: `fastgda import-release data/coco --workspace release`
    """
    from storage_schemas.workspace import Workspace

    place = Workspace.at(workspace)
    if not release.is_dir():
        _import_pickle(place, release, name, teacher, query_ids, samples)
        return
    from flows.commands.own_server import run_flow, start_server

    start_server()
    from flows.indexing import rebuild_index
    from tasks.importing.release import Asked, import_folder

    asked = Asked(release, str(place.root), config_file, name, space, pipeline, encoders)
    imported = import_folder(asked)
    if imported.head is not None:
        run_flow(rebuild_index, imported.config, imported.head.artifact.key)
    _tell(place, imported, config_file)


def _import_pickle(
    place: Workspace, path: Path, name: str, teacher: str, query_ids: Path | None, samples: str | None
) -> None:
    from storage_schemas.publishing.release import import_release as import_pickle

    names = query_ids.read_text(encoding="utf-8").splitlines() if query_ids else None
    run = import_pickle(place, path, name=name, teacher=teacher, query_ids=names, samples=samples)
    say(f"run {run}; {command(place, f'publish {run}')} shows it to readers")


def _tell(place: Workspace, imported: Imported, config: Path) -> None:
    """Print what was imported, what cannot be done with it, and what comes next."""
    say(f"published: {', '.join(imported.runs)}; {config} is the configuration")
    for name, head in imported.heads.items():
        say(f"head {head.artifact.key}: {name}")
    for line in imported.lacking:
        say(line)
    if imported.head is None:
        say(f"no head of {imported.config.features.space}: next `fastgda train {shlex.quote(str(config))}`")
    else:
        say(f"its index is built: `fastgda evaluate {shlex.quote(str(config))}` measures and promotes it")
