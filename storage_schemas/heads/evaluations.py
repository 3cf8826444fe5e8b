"""What the metrics in a workspace are of, and whether one head ranks worse than another."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from storage_schemas import tables
from storage_schemas.files import AnyPath, matching, read_if_there, write_changed
from storage_schemas.workspace import Workspace

ERRORS_BEHIND = 2.0  # a mAP that is lower by more standard errors than this is worse


class EvaluationRecord(BaseModel):
    """`metrics/<key>.json`: the head that the metrics beside it are of, and the snapshot whose labels judged it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    head: str
    snapshot: str


@dataclass(frozen=True)
class Precision:
    """mAP(L) of a head on test queries: the mean, and each query's where they were kept."""

    mean: float
    queries: dict[str, float]


def write_evaluation(workspace: Workspace, key: str, record: EvaluationRecord) -> None:
    """Note what the metrics of this key are of."""
    write_changed(workspace.evaluation(key), record.model_dump_json(indent=2).encode() + b"\n")


def read_evaluations(workspace: Workspace) -> dict[tuple[str, str], AnyPath]:
    """Return the newest metrics of each head, by the head's version and the snapshot that they were measured on."""
    found: dict[tuple[str, str], tuple[float, AnyPath]] = {}
    for path in matching(workspace.root / "metrics", "*.json"):
        metrics = workspace.metrics(path.stem)
        content = read_if_there(path) if not path.name.endswith(".manifest.json") else None
        try:
            record = EvaluationRecord.model_validate_json(content or b"")
            at = metrics.stat().st_mtime
        except (ValidationError, FileNotFoundError):  # damaged, or without its metrics: as if it were not there
            continue
        if at >= found.get((record.head, record.snapshot), (-math.inf, metrics))[0]:
            found[record.head, record.snapshot] = at, metrics
    return {of: metrics for of, (_, metrics) in found.items()}


def read_precision(metrics: AnyPath, cutoff: int) -> Precision | None:
    """Read how a head ranks on the test queries; None where that was not measured at this cutoff."""
    rows = [
        row
        for row in tables.read(metrics, tables.METRICS).to_pylist()
        if (row["space"], row["split"], row["cutoff"]) == ("tuned", "test", cutoff) and row["metric"] in ("AP", "mAP")
    ]
    mean = next((row["value"] for row in rows if not row["query_id"]), None)
    queries = {row["query_id"]: row["value"] for row in rows if row["query_id"]}
    return None if mean is None else Precision(mean, queries)


def worse(candidate: Precision, served: Precision) -> bool:
    """Return whether a head ranks worse than another, beyond what the choice of test queries explains.

    The differences of single queries say how large chance is; without them any lower mean is worse.
    """
    common = sorted(candidate.queries.keys() & served.queries.keys())
    if len(common) < 2:
        return candidate.mean < served.mean
    differences = [candidate.queries[name] - served.queries[name] for name in common]
    error = statistics.stdev(differences) / math.sqrt(len(common))
    return statistics.fmean(differences) < min(-ERRORS_BEHIND * error, -1e-9)
