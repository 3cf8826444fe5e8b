"""Leave-K-out: for each query and method a model without the first K samples that the method names for the query.

Source: the counterfactual evaluation of Wang et al. (arXiv 2406.09408), which FastGDA (arXiv 2511.10721) takes over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgda_core.evaluation.counterfactual import above_chance, smallest
from tasks.inputs.queries import load_queries
from tasks.judging.methods import RANDOM
from tasks.judging.metric_rows import metric_row, metric_rows
from tasks.judging.removals import NOTHING, Removals, ahead_rows
from tasks.teaching.run import Run

OWN = "leave-k-out"
OWN_CHANGE, BROKEN, BRITTLENESS = f"{OWN} loss change", f"{OWN} broken", f"{OWN} brittleness"


def leave_k_out_rows(run: Run, removals: Removals) -> list[dict[str, object]]:
    """Return what each query lost without the samples that a method named for it, and how its picture changed.

    By method and K: mean and standard error over the queries, and each query's own figure. Brittleness is the smallest
    K at which a query's loss rises further than by removing K at random (`above_chance`), the median over queries
    where at least half are broken; the share of broken queries stands beside it.
    """
    place = {query.query_id: number for number, query in enumerate(load_queries(run.artifacts["queries"]))}
    by_choice: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for removal in removals.plan:
        if not removal["pooled"]:
            by_choice.setdefault((removal["method"], removal["k"]), []).append(removal)
    if not by_choice:
        return []
    names = [removal["targets"][0] for removal in next(iter(by_choice.values()))]
    columns = [place[name] for name in names]
    # (removals, queries): what a removal for one query did to all of them.
    changes = {
        choice: torch.stack([removals.changes(tuple(each["removed"])) for each in several])[:, columns]
        for choice, several in by_choice.items()
    }
    rows: list[dict[str, object]] = []
    for (method, k), several in by_choice.items():
        rows += metric_rows(OWN_CHANGE, method, changes[method, k].diagonal(), names, cutoff=k)
        far = [removals.distances(tuple(each["removed"]), each["targets"]) for each in several]
        for name in far[0]:
            rows += metric_rows(f"{OWN} {name}", method, torch.cat([each[name] for each in far]), names, cutoff=k)
    rows += ahead_rows(OWN, {choice: each.diagonal() for choice, each in changes.items()})
    for name, values in removals.distances((), names).items():
        rows += metric_rows(f"{OWN} {name}", NOTHING, values, names)
    return [*rows, *_brittleness_rows(changes, names)]


def _brittleness_rows(changes: dict[tuple[str, int], Tensor], names: list[str]) -> list[dict[str, object]]:
    """Return the rows of brittleness; none of a single query, whose random removals have no spread."""
    if len(names) < 2:
        return []
    rows: list[dict[str, object]] = []
    counts = sorted({k for _, k in changes})
    for method in dict.fromkeys(method for method, _ in changes if method != RANDOM):
        broken = torch.stack([above_chance(changes[method, k].diagonal(), changes[RANDOM, k]) for k in counts])
        rows += [metric_row(BROKEN, method, row.double(), cutoff=k) for k, row in zip(counts, broken, strict=True)]
        found = smallest(counts, broken)
        rows += [
            metric_row(BRITTLENESS, method, value[None], query_id=name)
            for name, value in zip(names, found, strict=True)
            if value.isfinite()
        ]
        middle = found.sort().values[(len(found) - 1) // 2]
        if middle.isfinite():
            rows.append(metric_row(BRITTLENESS, method, middle[None]) | {"queries": len(names)})
    return rows
