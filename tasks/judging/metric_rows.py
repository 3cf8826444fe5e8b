"""Rows of the metrics table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastgda_core.evaluation.twins import TwinTest
from tasks.watching.trust import TWIN_SHARE, WORST_TWIN


def metric_rows(
    metric: str, space: str, values: Tensor, query_ids: Sequence[str], *, cutoff: int = 0
) -> Iterator[dict[str, object]]:
    """Yield the mean over the test queries, then one row for each; the "mAP" of a single query is its "AP".

    Args:
        metric: name of the mean.
        space: what is compared with the teacher's scores.
        values: (queries,).
        query_ids: of the values.
        cutoff: L, where the metric has one.
    """
    yield metric_row(metric, space, values, cutoff=cutoff)
    for query_id, value in zip(query_ids, values, strict=True):
        yield metric_row("AP" if metric == "mAP" else metric, space, value[None], cutoff=cutoff, query_id=query_id)


def metric_row(
    metric: str, space: str, values: Tensor, *, cutoff: int = 0, query_id: str = "", split: str = "test"
) -> dict[str, object]:
    """Return the row of the mean of some queries' values, with its standard error."""
    count = len(values)
    return {
        "metric": metric,
        "space": space,
        "split": split,
        "cutoff": cutoff,
        "query_id": query_id,
        "value": values.mean().item(),
        "standard_error": values.std().item() / count**0.5 if count > 1 else 0.0,
        "queries": count,
    }


def agreement_rows(
    space: str, measured: Sequence[Mapping[tuple[str, int], Tensor]], query_ids: Sequence[str]
) -> Iterator[dict[str, object]]:
    """Yield the rows of several queries' `agreement`.

    Args:
        space: what is compared with the teacher's scores.
        measured: for each query, by (measure, cutoff), (1,) each.
        query_ids: of these queries.
    """
    for metric, cutoff in measured[0]:
        values = torch.cat([one[metric, cutoff] for one in measured])
        yield from metric_rows(metric, space, values, query_ids, cutoff=cutoff)


def twin_rows(test: TwinTest, space: str, kind: str) -> list[dict[str, object]]:
    """Return the share of twins that a ranking has among its first, and the worst twin's rank.

    Args:
        test: where the twins are.
        space: what ranked.
        kind: of the queries.
    """
    found = torch.tensor(test.ranks) <= torch.tensor(test.places)
    worst = metric_row(WORST_TWIN, space, torch.tensor([float(test.worst)]), split=kind)
    return [metric_row(TWIN_SHARE, space, found.double(), split=kind), worst | {"queries": len(test.ranks)}]
