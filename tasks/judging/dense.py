"""What a judge holds of all queries and all samples, and where that cannot be."""

from __future__ import annotations

import os

from fastgda_core.errors import UsageError
from tasks.config.pipeline import PipelineConfig

_HELD = 4 * 8  # bytes of a pair at the least: float64 scores of the teacher and of three methods beside it


def check_judged(config: PipelineConfig, samples: int, queries: int) -> None:
    """Check, before any score is made, that a judge's scores of all pairs fit into memory.

    Models that are trained again without a share of the samples are compared by sums over all samples, so that a judge
    is for sets that can be trained on many times. All else is sparse.

    Raises:
        UsageError: they do not.
    """
    wanted, there = samples * queries * _HELD, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.judge is not None and wanted > there:
        raise UsageError(
            f"judge compares methods by scores of all {queries:,} queries and {samples:,} samples, which take "
            f"{wanted / 1e9:,.0f} GB or more, and this machine has {there / 1e9:,.0f} GB: judge a smaller set, or "
            "remove the section"
        )
