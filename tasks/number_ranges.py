"""Numbers of parts as short text, which a flow run's parameters have room for: `0-2,5`."""

from __future__ import annotations

from collections.abc import Iterable

from fastgda_core.errors import UsageError


def as_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def from_ranges(text: str) -> list[int]:
    """The inverse.

    Raises:
        UsageError: it is no list of numbers and ranges.
    """
    numbers: list[int] = []
    for piece in filter(None, text.split(",")):
        first, _, last = piece.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UsageError(f"{text!r} is no list of part numbers: write them as 0-2,5")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
