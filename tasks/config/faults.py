"""Faults of a configuration, in lines that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]
KINDS = ("counts", "shares", "recipe", "trainer")  # of a section that has several: no steps in the document


def faults(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return `FIELD: what is wrong: how to mend it` of each fault; FIELD is `config` for a fault of the whole."""
    return [_fault(dict(detail), model) for detail in error.errors()]


def _fault(detail: dict[str, Any], model: type[BaseModel]) -> str:
    location: Location = detail["loc"]
    field = ".".join(str(step) for step in location if step not in KINDS) or "config"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        likely = difflib.get_close_matches(str(location[-1]), _fields_beside(location, model), 1)
        message = f"no such field: {f'did you mean {likely[0]}?' if likely else 'correct the spelling or remove it'}"
    if detail["type"] == "missing":
        message = "is missing: add it"
    return f"{field}: {message}"


def _fields_beside(location: Location, model: type[BaseModel]) -> set[str]:
    """Return the fields of the section that a location is in; of all its kinds, where the section has several."""
    sections = [model]
    for step in location[:-1]:
        below = [
            section
            for above in sections
            if step in above.model_fields
            for section in _models_in(above.model_fields[str(step)].annotation)
        ]
        sections = below or sections  # a step that is no field is a place in a list or a kind
    return {name for section in sections for name in section.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
