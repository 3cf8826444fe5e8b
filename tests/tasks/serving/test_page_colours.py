"""The page's colours can be told apart by people who see little contrast (WCAG 2.2, level AA), light and dark."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

STYLE = files("tasks.serving").joinpath("page", "style.css").read_text()
TEXT, PARTS = 4.5, 3.0  # success criteria 1.4.3 and 1.4.11
PAIRS = [
    *[(text, ground, TEXT) for text in ("ink", "muted", "accent", "lower", "error") for ground in ("paper", "surface")],
    ("on-accent", "accent", TEXT),
    ("accent", "tint", TEXT),
    ("ink", "tint", TEXT),
    ("muted", "tint", TEXT),  # words of the place where a picture is dropped, while it is held over it
    *[(part, ground, PARTS) for part in ("edge", "accent", "lower") for ground in ("paper", "surface")],
]


def palettes() -> dict[str, dict[str, str]]:
    """The variables of both schemes; what the dark one leaves out is as in the light one."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    )
    return {"light": light, "dark": light | dark}


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as WCAG defines it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def test_black_on_white_is_twenty_one_to_one() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the usual example of one that just fails


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("front", "ground", "least"), PAIRS)
def test_colours_have_enough_contrast(scheme: str, front: str, ground: str, least: float) -> None:
    colours = palettes()[scheme]
    assert contrast(colours[front], colours[ground]) >= least
