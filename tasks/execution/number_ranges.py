"""Numbers of parts as short text, which a flow run's parameters have room for: `0-2,5`."""

from __future__ import annotations

from collections.abc import Iterable

from fastgda_core.errors import UsageError
from storage_schemas.runs.ledger import read_ledger
from storage_schemas.runs.liveness import is_preparation
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace


def as_ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ranges, ascending."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def from_ranges(text: str) -> list[int]:
    """Read what `as_ranges` wrote.

    Raises:
        UsageError: the text is no list of numbers and ranges.
    """
    numbers: list[int] = []
    for piece in text.split(",") if text else []:
        first, dash, last = piece.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UsageError(f"{text!r} is no list of part numbers: write them as 0-2,5")
        numbers += range(int(first), int(last) + 1)
    return numbers


def chosen_shards(workspace: Workspace, run: str, text: str | None) -> set[int] | None:
    """Return the score shards of a run that somebody named; None, which stands for all, where nobody did.

    Raises:
        UsageError: no shard is named, or one that the run does not have.
    """
    if text is None:
        return None
    if is_preparation(workspace, run):
        raise UsageError(f"{run} has no score shards, as it is done before a run is planned: leave --shard out")
    shards = set(from_ranges(text))
    known = set(read_ledger(workspace, run)["shard"].to_pylist())
    if not shards:
        raise UsageError(f"{text!r} names no shard of run {run}: write them as 0-2,5")
    if shards - known:
        raise UsageError(
            f"run {run} has no shard {min(shards - known)}: it has {len(known)}; "
            f"{command(workspace, f'status {run}')} names those that failed"
        )
    return shards
