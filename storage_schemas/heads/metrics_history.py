"""The evaluations that were made in a workspace, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from storage_schemas import tables
from storage_schemas.commit import read_manifest
from storage_schemas.files import AnyPath, matching
from storage_schemas.workspace import Workspace


@dataclass(frozen=True)
class Measured:
    """Mean mAP(L) of one evaluation."""

    key: str
    at: datetime
    tuned: float
    untuned: float
    queries: int


def mean_value(path: AnyPath, metric: str, space: str, cutoff: int) -> float | None:
    """Return a figure over all queries from a file of metrics; None where it is not there."""
    for row in tables.read(path, tables.METRICS).to_pylist():
        if (row["metric"], row["space"], row["cutoff"], row["query_id"]) == (metric, space, cutoff, ""):
            return float(row["value"])
    return None


def metrics_history(workspace: Workspace, cutoff: int) -> list[Measured]:
    """Return every evaluation with this cutoff, newest first."""
    found = []
    for path in matching(workspace.root / "metrics", "*.parquet"):
        manifest = read_manifest(path)
        if manifest is None:
            continue
        rows = tables.read(path, tables.METRICS).to_pylist()
        means = {r["space"]: r for r in rows if r["metric"] == "mAP" and not r["query_id"] and r["cutoff"] == cutoff}
        if {"tuned", "untuned"} <= means.keys():
            tuned, untuned = means["tuned"], means["untuned"]
            at = manifest.committed_at or datetime.fromtimestamp(0, UTC)
            found.append(Measured(path.stem, at, tuned["value"], untuned["value"], tuned["queries"]))
    return sorted(found, key=lambda made: made.at, reverse=True)
