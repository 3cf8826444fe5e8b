"""What a process keeps of a run in memory."""

from __future__ import annotations

import weakref
from dataclasses import replace

from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, Loaded
from tests.tasks.configs import document


class Heavy:
    """Something that a device holds."""


def test_what_is_loaded_stays_until_so_many_others_of_its_kind_are_asked_for() -> None:
    loaded = Loaded()
    first, second = (loaded.once("Fisher", number, Heavy, most=2) for number in range(2))
    assert loaded.once("steps", 0, Heavy) is not first, "of another kind"
    assert loaded.once("Fisher", 0, Heavy, most=2) is first and loaded.once("Fisher", 1, Heavy, most=2) is second
    loaded.once("Fisher", 2, Heavy, most=2)
    assert loaded.once("Fisher", 1, Heavy, most=2) is second and loaded.once("Fisher", 0, Heavy, most=2) is not first


def test_what_has_to_go_goes_before_the_next_is_loaded() -> None:
    loaded = Loaded()
    first = weakref.ref(loaded.once("steps", 0, Heavy))

    def load() -> Heavy:
        assert first() is None, "a device may not hold both"
        return Heavy()

    loaded.once("steps", 1, load)


def test_contexts_of_one_run_share_what_is_loaded_and_other_runs_have_their_own() -> None:
    config = PipelineConfig.model_validate(document())
    context, other = (Context(config, "model") for _ in range(2))
    found = context.loaded.once("steps", 0, Heavy)
    assert replace(context, config=config.model_copy()).loaded.once("steps", 0, Heavy) is found
    assert other.loaded.once("steps", 0, Heavy) is not found and other == context
