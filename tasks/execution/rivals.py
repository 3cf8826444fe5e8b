"""The runs of a judge's rivals, before any of them is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastgda_core.errors import UsageError
from fastgda_core.feature_spaces import require_encoders
from tasks.config.pipeline import PipelineConfig, check_sizes
from tasks.context import Context, open_context
from tasks.teaching.families import family_of


def rival_names(config: PipelineConfig) -> list[str]:
    """Return the rivals that a configuration's judge compares, in order; none without a judge."""
    return list(config.judge.rivals) if config.judge else []


def check_rivals(config: PipelineConfig, samples: int) -> dict[str, Context]:
    """Return the context of each rival's run, all checked before any work.

    Args:
        samples: how many training samples there are.

    Raises:
        UsageError: a rival cannot be scored here.
    """
    found = {}
    for name in rival_names(config):
        with _named(name):
            alone = config.of_rival(name)
            require_encoders(alone.candidates.space or alone.features.space, "space")
            context = open_context(alone)
            family_of(alone).check(context)
            check_sizes(alone, samples)
        found[name] = context
    return found


@contextmanager
def _named(rival: str) -> Iterator[None]:
    """Say of which rival a refusal in the block is."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"judge.rivals: {rival}: {error}") from error
