"""Rows of the metrics table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def metric_rows(
    metric: str, space: str, values: Tensor, query_ids: Sequence[str], *, cutoff: int = 0, of_one: str | None = None
) -> Iterator[dict[str, object]]:
    """The mean over the test queries, then one row for each of them.

    Args:
        metric: name of the mean.
        space: what is compared with the teacher's scores.
        values: (queries,).
        query_ids: theirs.
        cutoff: L, where the metric has one.
        of_one: what the metric is called for a single query, if not the same.
    """
    yield metric_row(metric, space, values, cutoff=cutoff)
    for query_id, value in zip(query_ids, values, strict=True):
        yield metric_row(of_one or metric, space, value[None], cutoff=cutoff, query_id=query_id)


def metric_row(metric: str, space: str, values: Tensor, *, cutoff: int = 0, query_id: str = "") -> dict[str, object]:
    """The mean of some queries' values, with its standard error."""
    count = len(values)
    return {
        "metric": metric,
        "space": space,
        "split": "test",
        "cutoff": cutoff,
        "query_id": query_id,
        "value": values.mean().item(),
        "standard_error": values.std().item() / count**0.5 if count > 1 else 0.0,
        "queries": count,
    }
