"""The command that says who is owed what."""

from __future__ import annotations

import csv
import json
import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgda_core.errors import UsageError
from flows.commands.options import DEFAULT_WORKSPACE, WorkspaceOption
from flows.commands.terminal import say, warn
from flows.commands.text_table import print_rows
from storage_schemas.workspace import Workspace

if TYPE_CHECKING:
    from tasks.serving.shares_answer import Share, SharesAnswer

BAR = 24  # letters of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"
_NOISE = {
    "pairs": "noise of scores by each pair's standard error",
    "agreement": "noise of scores by the teacher's agreement with another teacher",
    "groups": "noise of the picture's own gradient alone",
    "calibration": "errors by how far such predictions are off on queries that the teacher scored",
    "unknown": "the noise of scores is not known, so errors are too small: see teacher.draws, or `fastgda evaluate`",
}


class PictureTier(StrEnum):
    """How a picture that no teacher scored is answered."""

    fast = "fast"
    sketch = "sketch"


def shares(
    by: Annotated[
        str, typer.Option(help="Column of samples, or key of their metadata, that names who is paid.")
    ] = "shard",
    query: Annotated[list[str] | None, typer.Option(help="A query; given again, several. Default: all.")] = None,
    split: Annotated[str | None, typer.Option(help="Queries of this split alone: train, validation, test, ...")] = None,
    since: Annotated[datetime | None, typer.Option(help="Queries that a run planned from then on scored, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Queries that a run planned before then scored, UTC.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="A generated image that need not be scored, with --caption.")
    ] = None,
    caption: Annotated[str | None, typer.Option(help="The caption that --image was generated from.")] = None,
    tier: Annotated[
        PictureTier, typer.Option(help="Of --image. fast: predicted from the index; sketch: scores, by its gradient.")
    ] = PictureTier.fast,
    limit: Annotated[int, typer.Option(min=1, help="Rows of the table; CSV and JSON have all.")] = 20,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The share of each creator, tar or other group of training images in the influence on queries; see docs/shares.md.

    Example: `fastgda shares --by shard --split test`
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json are two forms of one answer: give one of them")
    place = Workspace.at(workspace)
    if image is not None or caption is not None:
        if query or split or since or until:
            raise UsageError("--image asks for one picture: leave out --query, --split, --since and --until")
        answer = _of_picture(place, image, caption, by, tier)
    else:
        from tasks.serving.shares import published_shares

        answer = published_shares(place, by, query_ids=query, split=split, since=since, until=until)
    if as_json:
        print(json.dumps(answer.as_json(), indent=2, allow_nan=False))
    elif as_csv:
        _print_csv(answer)
    else:
        print_shares(answer, limit)


def _of_picture(place: Workspace, image: Path | None, caption: str | None, by: str, tier: PictureTier) -> SharesAnswer:
    if image is None or caption is None:
        raise UsageError("--image and --caption go together: give the picture and what it was generated from")
    from storage_schemas.snapshots.published import read_published
    from tasks.serving.question import check_caption, check_sketched, read_picture

    picture = read_picture(image)
    check_caption(caption, "--caption")
    if tier is PictureTier.sketch:
        check_sketched(place, read_published(place).run)
    from tasks.serving.loaded import Loaded
    from tasks.serving.picture_shares import PictureShares

    return PictureShares(Loaded(place)).shares(picture, caption, by, tier.value)


def _print_csv(answer: SharesAnswer) -> None:
    rows = answer.as_json()["rows"]
    writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def print_shares(answer: SharesAnswer, limit: int) -> None:
    """Print the largest shares with bars, and what they are made of."""
    shown = answer.rows[:limit]
    longest = max(row.share for row in shown)
    print_rows(
        [answer.by, "share", "", "±", "interval", "S/N", "lift", "samples", "queries", ""],
        [_row(row, longest) for row in shown],
        sys.stdout,
    )
    left_out = f"the first {len(shown)} of {len(answer.rows):,}; " if len(answer.rows) > len(shown) else ""
    unproven = sum(not row.proven for row in answer.rows)
    say(
        f"{left_out}{unproven:,} of {len(answer.rows):,} unproven; mean over {answer.queries:,} queries"
        + (f", {answer.silent:,} more have no positive influence" if answer.silent else "")
        + f"; intervals of {answer.level:.0%} for all together; {_NOISE[answer.noise]}"
    )
    if answer.judged:
        say(f"models that were trained again, on test queries: {answer.judged}")
    else:
        warn("no model was trained again to see whether this teacher's scores are true: see docs/judges.md")
    for warning in answer.warnings:
        warn(warning)


def _row(row: Share, longest: float) -> list[str]:
    between = "-" if row.low is None or row.high is None else f"{_percent(row.low)} to {_percent(row.high)}"
    verdict = "unproven" if not row.proven else f"{row.beyond_uniform} than its samples" if row.beyond_uniform else ""
    return [
        row.payee,
        _percent(row.share),
        bar(row.share / longest),
        "-" if row.standard_error is None else _percent(row.standard_error),
        between,
        "-" if row.signal_to_noise is None else f"{row.signal_to_noise:.1f}",
        f"{row.lift:.2f}",
        f"{row.samples:,}",
        f"{row.queries:,}",
        verdict,
    ]


def _percent(part: float) -> str:
    return f"{100 * part:.3g}%"


def bar(part: float) -> str:
    """Return a bar of up to `BAR` letters for a number from 0 to 1, in eighths of a letter."""
    eighths = round(part * BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
