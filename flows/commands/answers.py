"""Commands that answer: SQL, and which training images made an image."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import DEFAULT_WORKSPACE, WorkspaceOption
from flows.commands.rows import (
    FormatOption,
    LimitOption,
    MemoryOption,
    OutputOption,
    StatementArgument,
    TableFormat,
    ThreadsOption,
    print_query,
)
from flows.commands.text_table import print_rows
from storage_schemas.workspace import Workspace

if TYPE_CHECKING:
    from tasks.serving.attribute import Attribution


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
    from storage_schemas.sql.views import ask

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

    from storage_schemas.snapshots.published import read_published
    from tasks.serving.question import check_caption, read_picture

    picture, place = read_picture(image), Workspace.at(workspace)
    check_caption(caption)
    read_published(place)
    from tasks.serving.attribute import AttributionService

    answers = AttributionService(place).attribute(picture, caption, k)
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=2))
        return
    print_answers(answers)


def print_answers(answers: list[Attribution]) -> None:
    """Print the training samples of an answer, best first."""
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
