"""Commands for the API keys of a service."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.terminal import say
from flows.commands.text_table import print_rows

keys_app = typer.Typer(name="keys", help="API keys of `fastgda serve`.", no_args_is_help=True)
DEFAULT_FILE = Path("fastgda-keys.json")
FileOption = Annotated[Path, typer.Option("--keys", help="The file of keys; it holds their hashes alone.")]
NameArgument = Annotated[str, typer.Argument(help="Whose key it is, as the logs name it.")]


class ScopeName(StrEnum):
    """What a key allows."""

    read = "read"
    admin = "admin"


@keys_app.command()
def add(
    name: NameArgument,
    scope: Annotated[
        ScopeName, typer.Option(help="read: ask; admin: also take images down and change what is served.")
    ] = ScopeName.read,
    keys: FileOption = DEFAULT_FILE,
) -> None:
    """Make a key and print it, once: the file holds its hash alone. Running services take it at once.

    Example: `fastgda keys add studio --scope read`
    """
    from tasks.serving.http.keys import add_key

    token = add_key(keys, name, scope.value)
    typer.echo(f"key {name}, scope {scope.value}, is in {keys}; it is shown this once:", err=True)
    print(token)  # alone on standard output: KEY=$(fastgda keys add ...)


@keys_app.command("list")
def list_keys(keys: FileOption = DEFAULT_FILE) -> None:
    """Names, scopes and ages of all keys.

    Example: `fastgda keys list`
    """
    from tasks.serving.http.keys import read_keys

    rows = [[key.name, key.scope, f"{key.created_at:%Y-%m-%d}"] for key in read_keys(keys).keys]
    print_rows(["name", "scope", "made on"], rows, sys.stdout)


@keys_app.command()
def revoke(name: NameArgument, keys: FileOption = DEFAULT_FILE) -> None:
    """Take a key away: running services refuse it at once.

    Example: `fastgda keys revoke studio`
    """
    from tasks.serving.http.keys import revoke_key

    revoke_key(keys, name)
    say(f"key {name} is revoked")
