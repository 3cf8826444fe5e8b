"""A small valid configuration, as YAML would give it."""

from __future__ import annotations

import copy

DOCUMENT: dict[str, object] = {
    "name": "tiny",
    "workspace": "made/workspace",
    "device": "cpu",
    "data": {"shards": "shards/*.tar"},
    "model": {"folder": "model"},
    "queries": {
        "captions": ["a red circle", "a blue square", "a pink cross"],
        "split": {"train": 1, "validation": 1, "test": 1},
    },
    "candidates": {"policy": "all"},
    "teacher": {"name": "abu_plus", "alpha": 1e-5},
    "evaluation": {"cutoffs": [1], "validation_cutoff": 1},
}

ABSENT = object()


def document(**changes: object) -> dict[str, object]:
    """The configuration with fields set, or left out with ABSENT; `__` goes one section down."""
    whole = copy.deepcopy(DOCUMENT)
    for place, value in changes.items():
        *sections, field = place.split("__")
        section: dict = whole
        for name in sections:
            section = section[name]
        if value is ABSENT:
            del section[field]
        else:
            section[field] = value
    return whole
