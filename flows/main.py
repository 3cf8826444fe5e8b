"""The `fastgda` command line."""

from __future__ import annotations

import os

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # what fails is raised, and said once, by us
import sys
from pathlib import Path

from flows import interruption

if Path(sys.argv[0]).name == "fastgda":  # the command, not a program that imports it: what follows takes a second
    interruption.watch(begun=False)
import atexit
import contextlib
import errno
import json
import shlex
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fastgda_core.errors import UsageError
from flows.lake import lake_app
from flows.lineage import lineage
from flows.monitoring import metrics
from flows.operations import print_summary, run_commands
from flows.own_server import start_server, wait_for_server
from flows.rows import (
    FormatOption,
    LimitOption,
    MemoryOption,
    OutputOption,
    StatementArgument,
    TableFormat,
    ThreadsOption,
    print_query,
)
from flows.store import DEFAULT_WORKSPACE, DEMO_FOLDER, WorkspaceOption, ledger_app, out, say, store_commands
from flows.text_table import print_rows
from storage_schemas.errors import StoreError
from storage_schemas.files import FULL_DISK
from storage_schemas.which_workspace import option
from storage_schemas.workspace import Workspace
from tasks.printable import printable

if TYPE_CHECKING:
    from tasks.attribute import Attribution

app = typer.Typer(
    name="fastgda",
    help="Which training images made this generated image? Teach, distil, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
err = Console(stderr=True)
# What a file system says of a place that somebody chose; anything else that it says is a bug, and shows where.
_ELSEWHERE = "choose a workspace that this user may read and write"
REFUSALS = {
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.ENOTDIR: "a file stands where a folder is needed: move it, or choose another place",
    errno.EISDIR: "a folder stands where a file is needed: move it, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "mend the symbolic link",
    errno.EMFILE: "allow this process more open files (`ulimit -n`)",
    errno.EIO: "the disk or its connection fails: mend it, then start the same command again",
    errno.ESTALE: "the file server lost the file: mount it again, then start the same command again",
    errno.ENOTCONN: "the disk's connection is gone: mount it again, then start the same command again",
}


def demo(
    folder: Annotated[Path, typer.Option(help="Where data, model and workspace are laid out.")] = DEMO_FOLDER,
    published: Annotated[
        bool, typer.Option("--published", help="With the paper's settings, which fail the twin test on this model.")
    ] = False,
) -> None:
    """The whole pipeline on OpenMoji: data, queries, teacher, head, index, evaluation, report.

    Example: `fastgda demo`
    """
    start_server()
    from flows.openmoji import CONFIG, PUBLISHED_CONFIG
    from flows.openmoji import demo as run_demo

    wait_for_server()
    print_summary(run_demo(folder.resolve(), PUBLISHED_CONFIG if published else CONFIG))
    workspace = folder / "workspace"
    say(
        f"\nAsk it something:  fastgda attribute {shlex.quote(str(workspace))}/queries/*/images/q0003.png "
        f'--caption "a laughing face with sunglasses"{option(Workspace.at(workspace))}'
    )


def sql(
    statement: StatementArgument,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    format: FormatOption = TableFormat.table,
    output: OutputOption = None,
    limit: LimitOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Read-only SQL over samples, queries, scores, ranks, runs, shards, metrics and more; see docs/sql.md.

    Example: `fastgda sql "SELECT count(*) FROM scores"`
    """
    from storage_schemas.views import ask

    def asked(text: str) -> Any:
        return ask(workspace, text, memory_gigabytes=memory, threads=threads)

    print_query(asked, statement, format, output, limit)


def attribute(
    image: Annotated[Path, typer.Argument(help="A generated image: PNG, JPEG or WebP.")],
    caption: Annotated[str, typer.Option(help="The caption that it was generated from.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many training images.")] = 20,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The training images that influenced an image most, from the index.

    Example: `fastgda attribute laughing.png --caption "a laughing face with sunglasses" -k 8`
    """
    from dataclasses import asdict

    from storage_schemas.snapshots import read_published
    from tasks.question import check_caption, read_picture

    picture, place = read_picture(image), Workspace.at(workspace)
    check_caption(caption)
    read_published(place)
    from tasks.attribute import AttributionService

    answers = AttributionService(place).attribute(picture, caption, k)
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=2))
        return
    print_answers(answers)


def print_answers(answers: list[Attribution]) -> None:
    """The training samples of an answer, best first."""
    rows = [
        [
            str(answer.position),
            str(answer.train_id),
            f"{answer.similarity:.4f}",
            answer.key,
            answer.caption,
            Path(answer.shard).name,
        ]
        for answer in answers
    ]
    print_rows(["#", "train_id", "cosine", "key", "caption", "shard"], rows, sys.stdout)


def train_demo_model(
    assets: Annotated[Path, typer.Option("--out", help="Folder for unet/, scheduler/ and samples.png.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 images.")] = 9000,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At the start of the cosine.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    initial: Annotated[Path | None, typer.Option(help="Train on from the weights of this folder.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the demo's data lies or is made.")] = DEMO_FOLDER,
) -> None:
    """Train the demo's denoiser again: over an hour on 2 cores.

    Example: `fastgda train-demo-model --out my_model`
    """
    from fastgda_core.diffusion.training import DenoiserTraining
    from flows.openmoji import train_model

    training = DenoiserTraining(steps=steps, learning_rate=learning_rate, seed=seed)
    grid = train_model(folder.resolve(), assets.resolve(), training, initial)
    out.print(f"Sample grid: {grid}", highlight=False, soft_wrap=True)


for command in (demo, sql, attribute, train_demo_model, *run_commands, lineage, *store_commands, metrics):
    app.command()(command)
app.add_typer(ledger_app)
app.add_typer(lake_app)


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated."""
    interruption.watch(begun=True)
    code = 1
    # Registered first, so it comes last of what is done at the end, and instead of what would follow: taking the
    # interpreter apart costs a second with torch, and now and then a library's thread aborts the process meanwhile.
    atexit.register(lambda: _leave(code))
    try:
        code = _run()
    except BaseException as end:
        if isinstance(end, SystemExit):
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if interruption.exit_code() is None or code == 0:
            raise
    if code and (interrupted := interruption.exit_code()) is not None:  # whatever it was that the signal led to
        interruption.say_how_to_go_on()
        code = interrupted


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that is gone, a stream that is closed
            stream.flush()
    os._exit(code)


def _run() -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Dynamo detected a call")  # diffusers under model.compile, harmless
    try:
        app(standalone_mode=True)
    except (UsageError, StoreError) as error:
        return _said("error", error, 2)
    except OSError as error:
        if error.errno in FULL_DISK:
            return _said("failed", error, 1)
        if error.errno not in REFUSALS or not (error.filename or isinstance(error, PermissionError)):
            raise
        place = f"{os.fsdecode(error.filename)}: " if error.filename else ""  # an object store names none
        return _said("error", f"{place}{error.strerror}: {REFUSALS[error.errno]}", 2)
    except _explained() as error:
        return _said("failed", error, 1)
    return 0


def _said(what: str, error: object, code: int) -> int:
    err.print(f"[red]{what}:[/] ", end="")
    err.print(printable(str(error), lines=True), markup=False, highlight=False, soft_wrap=True)
    return code


def _explained() -> tuple[type[BaseException], ...]:
    """The failures that have a message of their own, without importing the flows of commands that run none."""
    module = sys.modules.get("tasks.make_parts")
    return (module.RunIncomplete, module.RunCancelled, module.RunRefused, module.PartHangs) if module else ()
