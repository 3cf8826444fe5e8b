"""The command that asks an index of one's own before a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import ConfigArgument, read_config
from flows.commands.terminal import say


def candidates(
    config: ConfigArgument,
    list_to: Annotated[
        Path | None, typer.Option("--list", help="Parquet file for the rows to fetch, which img2dataset takes.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Folder of the .npy files behind the index: compare it with brute force.")
    ] = None,
    recall: Annotated[int, typer.Option(min=1, help="Queries of that comparison.")] = 16,
) -> None:
    """Ask the index of `candidates.index` for the queries' neighbours: how many are there, which are to be fetched.

    The training images need not be there, nor the model where queries are pictures.

    Example: `fastgda candidates my_config.yaml --list to_fetch.parquet`
    """
    checked = read_config(config)
    from tasks.config.packages import require_packages
    from tasks.inputs.wanted_rows import ask_index, list_rows, search_recall

    require_packages(checked)
    asked = ask_index(checked)
    index, k = asked.index, checked.candidates.k or 0
    lists, of = index.lists(k)
    looked = f"; a query looks at {lists:,} of {of:,} lists" if of else ""
    measure = "cosines" if index.is_cosine else "squared distances"
    say(f"index: {index.rows:,} rows of {index.width:,} numbers, by {measure}{looked}")
    there = (
        "data.shards matches no file" if asked.rows is None else f"{int((asked.rows >= 0).sum()):,} are in data.shards"
    )
    say(f"rows whose images are there: {there}")
    if embeddings is not None:
        share, queries = search_recall(asked, embeddings, recall)
        say(f"recall of the {k:,} nearest by brute force: {share:.3f} over {queries:,} queries")
    if list_to is not None:
        listed = list_rows(asked, list_to)
        say(f"{listed.pairs:,} pairs with {asked.queries.rows:,} queries fall on {listed.rows:,} rows")
        say(f"{list_to}: {listed.written:,} rows to fetch; {listed.there:,} are there")
