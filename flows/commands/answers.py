"""Commands that answer: SQL, and which training images made an image."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgda_core.errors import UsageError
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
    from tasks.serving.sketches import Influence, InfluenceAnswer


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


class Tier(StrEnum):
    """How an answer is made."""

    fast = "fast"
    sketch = "sketch"


def attribute(
    image: Annotated[Path, typer.Argument(help="A generated image: PNG, JPEG or WebP.")],
    caption: Annotated[str, typer.Option(help="The caption that it was generated from.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many training images.")] = 20,
    tier: Annotated[
        Tier, typer.Option(help="fast: the rank head and its index; sketch: scores, by the query's gradient.")
    ] = Tier.fast,
    first: Annotated[
        int | None, typer.Option(min=1, help="Of tier sketch: score the fast tier's first N alone; default: all.")
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Of tier sketch: divide scores by the length of the sample's gradient.")
    ] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The training images that influenced an image most: from the index, or from sketches of their gradients.

    Example: `fastgda attribute laughing.png --caption "a laughing face with sunglasses" -k 8`
    """
    from dataclasses import asdict

    from storage_schemas.snapshots.published import read_published
    from tasks.serving.question import check_caption, check_sketched, read_picture

    if tier is Tier.fast and (first is not None or relative):
        raise UsageError("--first and --relative are of tier sketch: add --tier sketch")
    picture, place = read_picture(image), Workspace.at(workspace)
    check_caption(caption)
    published = read_published(place)
    if tier is Tier.sketch:
        check_sketched(place, published.run)
        from tasks.serving.sketches import SketchService

        answer = SketchService(place).attribute(picture, caption, k, first=first, relative=relative)
        if as_json:
            print(json.dumps(asdict(answer), indent=2, allow_nan=False))
        else:
            print_influence(answer)
        return
    from tasks.serving.attribute import AttributionService

    answers = AttributionService(place).attribute(picture, caption, k)
    if as_json:
        print(json.dumps([asdict(each) for each in answers], indent=2))
        return
    print_answers(answers)


def print_answers(answers: list[Attribution]) -> None:
    """Print the training samples of an answer, best first."""
    rows = [_row(answer, f"{answer.similarity:.4f}") for answer in answers]
    print_rows(["#", "train_id", "similarity", "key", "caption", "shard"], rows, sys.stdout)


def print_influence(answer: InfluenceAnswer) -> None:
    """Print the training samples of an answer, best first, and what they hold of all influence."""
    rows = [_row(each, f"{each.score:.3e}", _relative_error(each)) for each in answer.samples]
    print_rows(["#", "train_id", "score", "±", "key", "caption", "shard"], rows, sys.stdout)
    print(
        f"of {answer.scored:,} samples scored these {len(rows)} hold {answer.share:.1%} of the positive influence; "
        f"negative influence is {-answer.negative / (answer.positive - answer.negative or 1):.1%} of all"
    )


def _relative_error(each: Influence) -> str:
    return "-" if each.standard_error is None else f"{each.standard_error / abs(each.score or 1):.0%}"


def _row(answer: Attribution | Influence, *figures: str) -> list[str]:
    return [
        str(answer.position),
        str(answer.train_id),
        *figures,
        answer.key,
        answer.caption,
        Path(answer.shard).name,
    ]
