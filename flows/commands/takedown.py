"""Commands that take training images down, and say what that changes."""

from __future__ import annotations

import getpass
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from fastgda_core.errors import UsageError
from flows.commands.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption
from flows.commands.terminal import say, warn
from flows.commands.text_table import print_rows
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace

if TYPE_CHECKING:
    from storage_schemas.publishing.takedown import TakeDown

NAMES = 8  # of heads, runs and the like that a line lists
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; it is kept in the record.")]
ByOption = Annotated[
    str, typer.Option("--by", help="Who wants it; kept in the record.", show_default="the user of this machine")
]


def remove(
    train_ids: Annotated[
        list[int] | None, typer.Argument(metavar="TRAIN_ID...", help="Of the published samples; see an answer.")
    ] = None,
    reason: ReasonOption = "",
    by: ByOption = "",
    undo: Annotated[
        int | None, typer.Option("--undo", metavar="NUMBER", help="Lift this take-down, which was wrong.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Take training images down: from now on no answer, no view of SQL and no export names them. See docs/takedown.md.

    Images of the same bytes are taken down wherever they are, also in data that is ingested later. Without --yes it
    says what would go, and asks.

    Example: `fastgda remove 17 256 --reason "the artist asked for it"`
    """
    place, who = Workspace.at(workspace), by or getpass.getuser()
    if undo is not None:
        if train_ids:
            raise UsageError("--undo lifts a whole take-down: name its number alone")
        _undo(place, undo, reason, who)
        return
    if not train_ids:
        raise UsageError("name the train_ids to take down, or --undo NUMBER")
    from storage_schemas.publishing.takedown import plan_take_down, take_down

    if not yes:
        planned = plan_take_down(place, train_ids, reason=reason, by=who)
        if planned.asked:
            _say_what_goes(planned)
            _ask(len(planned.asked))
    done = take_down(place, train_ids, reason=reason, by=who)
    for train_id, number in done.already.items():
        say(f"{train_id} was taken down before, by record {number}")
    if not done.asked:
        return
    if yes:
        _say_what_goes(done)
    undoing = command(place, f"remove --undo {done.record.number} --reason WHY")
    say(f"taken down: record {done.record.number}; no answer names them from now on. {undoing} lifts it")


def _undo(place: Workspace, number: int, reason: str, who: str) -> None:
    from storage_schemas.publishing.takedown import lift

    record = lift(place, number, reason=reason, by=who)
    say(f"take-down {number} is lifted, by record {record.number}: its images are seen again")


def _ask(count: int) -> None:
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here: read what would go above, then add --yes")
    typer.confirm(f"take {count} down?", abort=True)


def _say_what_goes(planned: TakeDown) -> None:
    record = planned.record
    rows = [[str(each.train_id), each.key, each.image_sha256] for each in planned.asked]
    print_rows(["train_id", "key", "image_sha256"], rows, sys.stdout)
    named = {(each.samples, each.train_id) for each in planned.asked}
    copies = [each for each in record.removed if (each.samples, each.train_id) not in named]
    if copies:
        say(f"and the same bytes elsewhere: {_some([f'{each.train_id} of {each.samples}' for each in copies])}")
    held = {
        "runs": record.runs,
        "snapshots": record.snapshots,
        "heads": record.heads,
        "indexes": record.indexes,
    }
    for what, names in held.items():
        if names:
            say(f"{what} that held it, stale from then on: {_some(names)}")
    if record.reports:
        warn(f"pages that may show it stay as they are: {_some(record.reports)}")


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


def diff(
    before: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="`fastgda sql` names them: heads.snapshot.")],
    after: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The one that is compared with it.")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many of each query's first samples.")] = 10,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Which queries' first k samples changed between two snapshots of scores, and which samples came and went.

    Example: `fastgda diff openmoji-1b2c3d4e5f-0a1b2c3d openmoji-2c3d4e5f6a-1b2c3d4e -k 20`
    """
    from storage_schemas.snapshots.changes import answers_changed

    rows = answers_changed(Workspace.at(workspace), before, after, k).to_pylist()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    shown = [
        [row["query_id"], row["change"], f"{row['overlap']:.2f}", str(row["moved"])]
        + [", ".join(map(str, row[name])) or "-" for name in ("entered", "dropped")]
        for row in rows
    ]
    if shown:
        print_rows(["query_id", "", "overlap", "moved", "entered", "dropped"], shown, sys.stdout)
    counted = Counter(row["change"] for row in rows)
    found = ", ".join(f"{count:,} {change}" for change, count in counted.most_common()) or "none changed"
    say(f"queries by their first {k} samples: {found}")


takedown_commands = (remove, diff)
