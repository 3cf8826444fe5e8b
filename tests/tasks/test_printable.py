from __future__ import annotations

import json

import pytest
from rich.cells import cell_len

from tasks.printable import SHOWN, cell, printable

HOSTILE = "\x1b[2J \x9b31m \x00 \x07 \x7f \u202e \u2066 \u2028 \ud800"


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    shown = printable(HOSTILE + "\r\n\t")
    assert shown.isprintable() and "\\u001b[2J" in shown and shown.endswith("\\r\\n\\t")
    assert json.loads(f'"{shown}"') == HOSTILE + "\r\n\t"
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["", "a cat", "un été à la plage", "猫", "👩🏽‍🚀 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "می‌خواهم", "a\u00a0b"])
def test_text_of_any_language_stays(text: str) -> None:
    assert printable(text) == cell(text) == text


def test_lines_stay_where_they_are_asked_for() -> None:
    assert printable("one\ntwo\r", lines=True) == "one\ntwo\\r"


def test_a_cell_is_one_short_line_that_holds_any_name_of_a_file() -> None:
    assert cell("k" * 255) == "k" * 255
    long = cell("a caption\n" * 10_000)
    assert len(long) == SHOWN and long.endswith("…") and "\n" not in long
    assert cell_len(cell("\x1b" * 100_000)) == SHOWN
