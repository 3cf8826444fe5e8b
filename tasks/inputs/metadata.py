"""Further fields that a tar's .json brings of a sample: licence, creator, source, whatever answers are filtered by."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastgda_core.errors import BadSample

CAPTIONS = ("caption", "captions")
MOST_FIELDS = 64
LONGEST_NAME, LONGEST_TEXT = 64, 2000  # characters
_INT64 = 2**63


def metadata_of(document: Mapping[str, Any]) -> str:
    """Return the fields that hold one text, number or truth value as a JSON object, names in order.

    Lists and objects are left out, and null is as if the field were not there.

    Raises:
        BadSample: there are too many fields, or one is too long or no text that a file can hold.
    """
    found: dict[str, str | bool | int | float] = {}
    for name, value in document.items():
        if name in CAPTIONS or not isinstance(value, str | bool | int | float):
            continue
        _check(name, value)
        found[name] = value
    if len(found) > MOST_FIELDS:
        raise BadSample(f"its .json has {len(found):,} fields beside captions: it may have {MOST_FIELDS}")
    return json.dumps(found, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _check(name: str, value: str | bool | int | float) -> None:
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        shown = name.encode("ascii", "backslashreplace").decode()[:LONGEST_NAME]
        raise BadSample(f"its .json has a field {shown!r}: a name has 1 to {LONGEST_NAME} printable characters")
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            raise BadSample(f"{name} of its .json has {len(value):,} characters: it may have {LONGEST_TEXT:,}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadSample(f"{name} of its .json holds a lone surrogate: write it as UTF-8") from None
        if "\0" in value:
            raise BadSample(f"{name} of its .json holds a character NUL")
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadSample(f"{name} of its .json is {value}: write a finite number, or leave it out")
    elif not -_INT64 <= value < _INT64:
        raise BadSample(f"{name} of its .json is no number of 64 bits: write it as text")
