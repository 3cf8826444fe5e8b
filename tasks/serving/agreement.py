"""How far each tier's answers agree with the teacher's, and what judges found of the teacher itself."""

from __future__ import annotations

from typing import Any

from storage_schemas import tables
from storage_schemas.heads.records import HeadRecord, check_tables
from storage_schemas.snapshots.published import Published
from storage_schemas.workspace import Workspace
from tasks.config.judging import CAPTIONS, UNTUNED
from tasks.serving.answers import Agreement, Measure, Tier, Way
from tasks.serving.untuned import Kind, space_of
from tasks.watching.trust import HEAD, LDS, OTHER_GRADIENT, TEACHER, trust_in

# The name of each tier in `metrics`. Tier exact draws the gradient of the query anew, and nothing else.
RANKINGS: dict[Tier, str] = {"fast": HEAD, "sketch": "sketch", "exact": OTHER_GRADIENT}
_KINDS: tuple[Kind, ...] = ("images", "captions")
_UNMEASURED = "nobody has measured how far this tier agrees with the teacher: `fastgda evaluate CONFIG` does"
_MEASURES = ("mAP", "recall", "spearman")


def agreements(workspace: Workspace, published: Published, head: HeadRecord | None) -> dict[Way, Agreement]:
    """Return the agreement of each tier and of untuned features, from what evaluation and judges measured.

    Args:
        workspace: where.
        published: the state whose figures are wanted.
        head: the record of the published head; None: there is none.
    """
    rows: list[dict[str, Any]] = []
    paths = [workspace.file(published.metrics)] if published.metrics else []
    for path in [*paths, *check_tables(workspace, published.run)]:
        rows += tables.read(path, tables.METRICS).to_pylist()
    # Checks that were made since an evaluation stand in for what it copied of them.
    means = {(row["space"], row["metric"], row["cutoff"]): row for row in rows if _is_mean(row)}
    judged: dict[Tier, str] = {"fast": f"{head.kind if head else ''} head", "sketch": "sketch", "exact": TEACHER}
    warnings = " ".join(trust_in(workspace, published.run).warnings)
    found: dict[Way, Agreement] = {
        tier: _of_way(means, space, judged[tier], published, warnings, _UNMEASURED) for tier, space in RANKINGS.items()
    }
    if head is not None:
        for kind in _KINDS:
            name = _judged_space(kind, head)
            found[kind] = _of_way(means, name, name, published, warnings)
    return found


def _judged_space(kind: Kind, head: HeadRecord) -> str:
    """Return what evaluation and judges call the untuned features of one kind, where they looked at them."""
    space = space_of(kind, head.feature_space)
    if space == head.feature_space:
        return UNTUNED
    return CAPTIONS if kind == "captions" else f"{space}, centred" if head.centre else space


def _is_mean(row: dict[str, Any]) -> bool:
    return row["split"] == "test" and not row["query_id"] and row["metric"] in (*_MEASURES, LDS)


def _of_way(
    means: dict[tuple[str, str, int], dict[str, Any]],
    space: str,
    judged: str,
    published: Published,
    warnings: str,
    unmeasured: str = "",
) -> Agreement:
    found = [row for (of, metric, _), row in means.items() if of == space and metric != LDS]
    found += [row for (of, metric, _), row in means.items() if of == judged and metric == LDS]
    found.sort(key=lambda row: ((*_MEASURES, LDS).index(row["metric"]), row["cutoff"] != _cutoff(published)))
    measures = [Measure(_named(row), row["value"], row["standard_error"] or None, row["queries"]) for row in found]
    if not measures:
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
