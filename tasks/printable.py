"""Text that others wrote (captions, keys, paths, error messages) as a terminal may show it."""

from __future__ import annotations

import json
import re

SHOWN = 256  # characters of a table's cell: no name of a file is longer, so no id is cut

# What moves a cursor, changes colours or turns the writing direction: C0, C1, marks of direction, line separators.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return text with control characters as JSON writes them, `\u001b`, `\n`; `lines` leaves line ends alone."""
    return _CONTROL.sub(lambda found: found[0] if lines and found[0] == "\n" else json.dumps(found[0])[1:-1], text)


def cell(text: str) -> str:
    """Return text for one cell of a table: on one line, cut where it is long."""
    shown = printable(text)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
