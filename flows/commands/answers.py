"""Commands that answer: SQL, and which training images made an image."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgda_core.errors import UsageError
from flows.commands.options import DEFAULT_WORKSPACE, WorkspaceOption
from flows.commands.print_answer import print_answer
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
from storage_schemas.workspace import Workspace


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


AROUND = 5  # of each list beside the hits


class Tier(StrEnum):
    """How an answer is made."""

    fast = "fast"
    sketch = "sketch"
    exact = "exact"


def attribute(
    image: Annotated[
        Path | None, typer.Argument(help="A generated image: PNG, JPEG or WebP.", show_default=False)
    ] = None,
    caption: Annotated[str | None, typer.Option(help="The caption that it was generated from.")] = None,
    query: Annotated[str | None, typer.Option(metavar="QUERY_ID", help="In their place: a stored query.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many training images.")] = 20,
    tier: Annotated[
        Tier,
        typer.Option(help="fast: the head and its index; sketch: scores by the query's gradient; exact: the teacher."),
    ] = Tier.fast,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help='Name samples alone for which this holds, as "width > 64".')
    ] = None,
    exclude: Annotated[
        list[int] | None, typer.Option(metavar="TRAIN_ID", help="Never name this one; repeat it.")
    ] = None,
    first: Annotated[
        int | None,
        typer.Option(min=1, help="Score the fast tier's first N alone; sketch: all, exact: 400 unless given."),
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Of tier sketch: divide scores by the length of the sample's gradient.")
    ] = False,
    beside: Annotated[
        bool, typer.Option("--beside", help="Answer in the other ways, too: tiers that are ready, untuned features.")
    ] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The training images that influenced an image most: from the index, from sketches, or by the teacher itself.

    Example: `fastgda attribute laughing.png --caption "a laughing face with sunglasses" -k 8`
    """
    from storage_schemas.snapshots.published import read_published
    from tasks.serving.question import check_caption, check_sketched, read_picture

    if tier is Tier.fast and first is not None:
        raise UsageError("--first is of tiers sketch and exact: add --tier sketch or --tier exact")
    if tier is not Tier.sketch and relative:
        raise UsageError("--relative is of tier sketch: add --tier sketch")
    if (query is None) == (image is None and caption is None):
        raise UsageError("give an image and its caption, or --query QUERY_ID for a stored query")
    picture, place = None if image is None else read_picture(image), Workspace.at(workspace)
    if caption is not None:
        check_caption(caption, "--caption")
    published = read_published(place)
    if tier is Tier.sketch:
        check_sketched(place, published.run)
    from tasks.progress import stage
    from tasks.serving.attributor import Attributor

    attributor = Attributor(place, load=[tier.value])
    settings: dict[str, Any] = {"k": k, "tier": tier.value, "where": where, "exclude": exclude or []}
    settings |= {"first": first, "relative": relative, "around": AROUND, "beside": beside}
    with stage("the teacher's scores, in percent", 100 if tier is Tier.exact else 0) as advance:
        settings["progress"] = _percent(advance)
        if query is not None:
            answer = attributor.attribute_query(query, **settings)
        else:
            answer = attributor.attribute(picture, caption, **settings)
    if as_json:
        print(json.dumps(answer.as_json(), indent=2, allow_nan=False))
    else:
        print_answer(answer)


def _percent(advance: Callable[[int], None]) -> Callable[[float], None]:
    """Return what moves a bar of 100 to a share of the work."""
    reached = 0

    def progress(share: float) -> None:
        nonlocal reached
        percent = round(100 * share)
        advance(percent - reached)
        reached = percent

    return progress
