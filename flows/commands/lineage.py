"""The command that says what an answer of the index was made from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from flows.commands.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, trimmed
from tasks.printable import printable

if TYPE_CHECKING:
    from storage_schemas.audit.facts import Node

IdentifierArgument = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="`served`, `train:TRAIN_ID`, an index, head or snapshot version, a run, RUN/SHARD, "
        "QUERY_ID:TRAIN_ID or RUN/QUERY_ID:TRAIN_ID.",
        callback=trimmed,
    ),
]

# As wide as its longest line: a checksum that is cut or folded cannot be copied.
out = Console(width=10_000, highlight=False, soft_wrap=True)


def lineage(
    identifier: IdentifierArgument, workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False
) -> None:
    """Trace an index, an answer or a score back to head, snapshot, run, settings, model, data and code.

    Example: `fastgda lineage served`
    """
    from storage_schemas.audit.lineage import lineage as lineage_of
    from storage_schemas.workspace import Workspace

    node = lineage_of(Workspace.at(workspace), identifier)
    if as_json:
        print(json.dumps(node.as_json(), indent=2))
        return
    out.print(_tree(node))


def _tree(node: Node, above: Tree | None = None) -> Tree:
    label = Text.assemble((node.kind, "bold"), " ", printable(node.name))
    for name, value in node.facts.items():
        label.append(f"\n{printable(name)}: {printable(value)}", "dim")
    tree = Tree(label) if above is None else above.add(label)
    for behind in node.made_from:
        _tree(behind, tree)
    return tree
