"""Evaluations of a workspace, one after the other."""

from __future__ import annotations

from pathlib import Path

from storage_schemas import tables
from storage_schemas.commit import manifest_path, read_manifest
from storage_schemas.heads.metrics_history import mean_value, metrics_history
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import write_table


def write(root: Path, name: str, cutoff: int, **values: float) -> Path:
    rows: list[dict[str, object]] = [
        {"metric": "mAP", "space": space, "split": "test", "cutoff": cutoff, "query_id": query, "queries": 3}
        | {"value": value if not query else 0.9, "standard_error": 0.1}
        for space, value in values.items()
        for query in ("", "q0")
    ]
    return write_table(Workspace(root).metrics(name), tables.METRICS, rows)


def test_a_mean_is_that_of_all_queries(tmp_path: Path) -> None:
    path = write(tmp_path, "a", 2, tuned=0.5, untuned=0.4)
    assert mean_value(path, "mAP", "untuned", 2) == 0.4
    assert mean_value(path, "mAP", "untuned", 4) is None and mean_value(path, "ndcg", "untuned", 2) is None


def test_every_whole_evaluation_is_told_newest_first(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        write(tmp_path, name, 2, tuned=0.5 + number / 10, untuned=0.4)
    write(tmp_path, "other cutoff", 4, tuned=0.5, untuned=0.4)
    write(tmp_path, "half", 2, tuned=0.5)
    manifest_path(write(tmp_path, "never committed", 2, tuned=0.5, untuned=0.4)).unlink()
    undated = read_manifest(Workspace(tmp_path).metrics("b"))
    assert undated is not None
    manifest_path(Workspace(tmp_path).metrics("b")).write_text(
        undated.model_copy(update={"committed_at": None}).model_dump_json()
    )
    found = metrics_history(Workspace(tmp_path), 2)
    assert [(each.key, each.tuned, each.untuned, each.queries) for each in found] == [
        ("c", 0.7, 0.4, 3), ("a", 0.5, 0.4, 3), ("b", 0.6, 0.4, 3),
    ]  # fmt: skip
