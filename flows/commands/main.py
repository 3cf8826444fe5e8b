"""The `fastgda` command line."""

from __future__ import annotations

import os

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # what fails is raised, and said once, by us
import sys
from pathlib import Path

from flows.commands import interruption

if Path(sys.argv[0]).name == "fastgda":  # the command, not a program that imports it: what follows takes a second
    interruption.watch(begun=False)
import atexit
import contextlib
import errno
import faulthandler
from typing import Annotated

import typer
from rich.console import Console

from fastgda_core.errors import UsageError
from flows.commands.answers import attribute, sql
from flows.commands.candidates import candidates
from flows.commands.demo import demo, train_demo_model
from flows.commands.import_release import import_release
from flows.commands.index import index_app
from flows.commands.keys import keys_app
from flows.commands.lake import lake_app
from flows.commands.lineage import lineage
from flows.commands.metrics import metrics
from flows.commands.serve import serve
from flows.commands.shares import shares
from flows.commands.stages import stage_commands
from flows.commands.store import ledger_app, store_commands
from flows.commands.takedown import takedown_commands
from flows.commands.watch import watch_commands
from storage_schemas.errors import StoreError
from storage_schemas.files import FULL_DISK
from tasks import logs
from tasks.printable import printable

app = typer.Typer(
    name="fastgda",
    help="Which training images made this generated image? Teach, distil, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
err = Console(stderr=True)
# Errors of a file system about a place that a person chose; any other is a bug, and is shown with its traceback.
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


@app.callback()
def log(
    log_level: Annotated[
        str,
        typer.Option(
            metavar="|".join(logs.LEVELS),
            envvar=logs.LEVEL,
            help="Log records to show, from this level on.",
            show_default="warning at a terminal, else info",
        ),
    ] = "",
    log_format: Annotated[
        str, typer.Option(metavar="|".join(logs.FORMATS), envvar=logs.FORMAT, help="How log records are written.")
    ] = "text",
) -> None:
    """Log as asked, in this process and in those that it starts."""
    level = log_level or logs.default_level()
    logs.set_up(level, log_format)
    os.environ.update({logs.LEVEL: level, logs.FORMAT: log_format})


for command in (
    demo,
    sql,
    attribute,
    serve,
    train_demo_model,
    *stage_commands,
    *watch_commands,
    candidates,
    lineage,
    *store_commands,
    import_release,
    *takedown_commands,
    metrics,
    shares,
):
    app.command()(command)
app.add_typer(index_app)
app.add_typer(ledger_app)
app.add_typer(lake_app)
app.add_typer(keys_app)


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 usage, 130 interrupted, 143 terminated."""
    faulthandler.enable()  # a library that crashes would else end the process without a word
    interruption.watch(begun=True)
    code = 1
    # Registered first, so it runs last at the end, in place of the interpreter's own clean-up: that costs a second with
    # torch, and now and then a library's thread aborts the process meanwhile.
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
    """Return the failures that have a message of their own, without importing flows that a command does not run."""
    module = sys.modules.get("tasks.execution.outcomes")
    return (module.RunIncomplete, module.RunCancelled, module.RunRefused, module.PartHangs) if module else ()
