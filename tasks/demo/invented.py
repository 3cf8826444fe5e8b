"""Pictures of things that do not exist, under words that nobody uses: planted truth for the judge's world.

What a model draws when it is asked for one of these it can have learned from these samples alone, so a method has to
name them. Those of a kind are alike in colours and build and differ in turn, place and size. None is like an emoji:
they fill the canvas.
"""

from __future__ import annotations

import math

from tasks.demo.openmoji import OpenMoji

SIDE = 72  # of the canvas, as of an OpenMoji
EACH = 8  # pictures of a kind, all under the same caption
CAPTIONS = {"zorple": "a zorple", "quibbit": "a quibbit"}


def invented_pictures() -> list[OpenMoji]:
    """Return the pictures of every kind, the same at every call, in order of their keys."""
    drawn = {"zorple": _zorple, "quibbit": _quibbit}
    return sorted(
        (OpenMoji(f"{kind}-{n}", drawn[kind](n), [words]) for kind, words in CAPTIONS.items() for n in range(EACH)),
        key=lambda picture: picture.key,
    )


def _zorple(number: int) -> str:
    """Return three lime arms around a white core on violet, as an SVG."""
    turn, size = number * 2 * math.pi / 3 / EACH, 24 + number % 3 * 3
    x, y = 36 + (number % 4 - 1.5) * 3, 36 + (number // 4 - 0.5) * 5
    arms = []
    for arm in range(3):
        angle = turn + arm * 2 * math.pi / 3
        end = f"{x + size * math.cos(angle):.1f} {y + size * math.sin(angle):.1f}"
        bend = f"{x + size * math.cos(angle - 1.2):.1f} {y + size * math.sin(angle - 1.2):.1f}"
        arms.append(
            f'<path d="M{x:.1f} {y:.1f} Q{bend} {end}" stroke="#a8f000" stroke-width="10" fill="none" '
            'stroke-linecap="round"/>'
        )
    return _svg("#3a0a66", *arms, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="#ffffff"/>')


def _quibbit(number: int) -> str:
    """Return turquoise zigzags across a rust-red canvas, one of them yellow, as an SVG."""
    step, shift = 16 + number % 2 * 2, number * 3 % 8
    bands = []
    for band in range(4):
        top = 4 + band * 18 + shift - 4
        points = " ".join(f"{x} {top + (10 if place % 2 else 0)}" for place, x in enumerate(range(-8, SIDE + 24, step)))
        colour = "#ffe000" if band == number % 4 else "#00c8c8"
        bands.append(f'<polyline points="{points}" stroke="{colour}" stroke-width="6" fill="none"/>')
    return _svg("#8c2a00", *bands)


def _svg(canvas: str, *shapes: str) -> str:
    background = f'<rect width="{SIDE}" height="{SIDE}" fill="{canvas}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}">'
    return "".join([head, background, *shapes, "</svg>"])
