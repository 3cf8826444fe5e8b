"""How far each tier's answers agree with the teacher's, and what judges found of the teacher itself."""

from __future__ import annotations

from typing import Any

from storage_schemas import tables
from storage_schemas.heads.records import check_tables
from storage_schemas.snapshots.published import Published
from storage_schemas.workspace import Workspace
from tasks.serving.answers import Agreement, Measure, Tier
from tasks.watching.trust import HEAD, LDS, OTHER_GRADIENT, TEACHER, trust_in

# The name of each tier in `metrics`. Tier exact draws the gradient of the query anew, and nothing else.
RANKINGS: dict[Tier, str] = {"fast": HEAD, "sketch": "sketch", "exact": OTHER_GRADIENT}
_MEASURES = ("mAP", "recall", "spearman")


def agreements(workspace: Workspace, published: Published, kind: str) -> dict[Tier, Agreement]:
    """Return the agreement of each tier, from what evaluation and judges measured on test queries.

    Args:
        workspace: where.
        published: the state whose figures are wanted.
        kind: of the published head.
    """
    rows: list[dict[str, Any]] = []
    paths = [workspace.file(published.metrics)] if published.metrics else []
    for path in [*paths, *check_tables(workspace, published.run)]:
        rows += tables.read(path, tables.METRICS).to_pylist()
    # Checks that were made since an evaluation stand in for what it copied of them.
    means = {(row["space"], row["metric"], row["cutoff"]): row for row in rows if _is_mean(row)}
    judged: dict[Tier, str] = {"fast": f"{kind} head", "sketch": "sketch", "exact": TEACHER}
    warnings = " ".join(trust_in(workspace, published.run).warnings)
    return {tier: _of_tier(means, space, judged[tier], published, warnings) for tier, space in RANKINGS.items()}


def _is_mean(row: dict[str, Any]) -> bool:
    return row["split"] == "test" and not row["query_id"] and row["metric"] in (*_MEASURES, LDS)


def _of_tier(
    means: dict[tuple[str, str, int], dict[str, Any]], space: str, judged: str, published: Published, warnings: str
) -> Agreement:
    found = [row for (of, metric, _), row in means.items() if of == space and metric != LDS]
    found += [row for (of, metric, _), row in means.items() if of == judged and metric == LDS]
    found.sort(key=lambda row: ((*_MEASURES, LDS).index(row["metric"]), row["cutoff"] != _cutoff(published)))
    measures = [Measure(_named(row), row["value"], row["standard_error"] or None, row["queries"]) for row in found]
    if not measures:
        unmeasured = "nobody has measured how far this tier agrees with the teacher: `fastgda evaluate CONFIG` does"
        return Agreement("mAP", None, None, published.teacher, " ".join(filter(None, [warnings, unmeasured])))
    first = measures[0]
    return Agreement(first.name, first.value, first.error, published.teacher, warnings, measures)


def _named(row: dict[str, Any]) -> str:
    return f"{row['metric']}({row['cutoff']})" if row["cutoff"] else str(row["metric"])


def _cutoff(published: Published) -> int:
    """Return the cutoff by which heads are chosen, of whatever release the configuration is."""
    evaluation = published.config.get("evaluation")
    found = evaluation.get("validation_cutoff") if isinstance(evaluation, dict) else None
    return found if isinstance(found, int) else 0
