"""One (query, training sample) pair: its rank, and the score shard that it is in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from storage_schemas.database import file_list, new_connection
from storage_schemas.files import AnyPath, matching
from storage_schemas.runs.ledger import read_compaction
from storage_schemas.runs.records import Part
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace


def select_rows(workspace: Workspace, paths: list[AnyPath], statement: str, values: object) -> list[tuple[Any, ...]]:
    """Run a statement over the Parquet files that replace {files} in it; return no rows where there are no files."""
    if not paths:
        return []
    files = f"read_parquet({file_list(paths)}, filename = true, hive_partitioning = false)"
    with new_connection(workspace, memory_gigabytes=1.0, threads=2) as connection:
        return list(connection.execute(statement.format(files=files), values).fetchall())


def ranked_pair(workspace: Workspace, run: str, query_id: str, train_id: int) -> dict[str, object]:
    """Return a pair's score, rank and label in the published snapshot, or in the run's own large files.

    Empty where neither holds the run's row of this pair.
    """
    compaction = read_compaction(workspace, run)
    try:
        snapshot = read_snapshot(workspace, read_published(workspace).snapshot)
    except NotPublished:
        snapshot = None
    places: list[tuple[str, list[Part]]] = [(snapshot.snapshot, snapshot.parts)] if snapshot else []
    places += [(f"run {run} alone", compaction.parts)] if compaction else []
    for name, parts in places:
        mine = [part for part in parts if part.run == run and part.first_query <= query_id <= part.last_query]
        rows = select_rows(
            workspace,
            [workspace.file(part.path) for part in mine],
            "SELECT score, rank, candidates, rank_label FROM (SELECT *, count(*) OVER () AS candidates FROM {files} "
            "WHERE query_id = ?) WHERE train_id = ?",
            [query_id, train_id],
        )
        for score, rank, candidates, label in rows:
            place = {"rank": rank, "candidates": candidates, "rank_label": f"{label:.6g}"}
            return {"score": score, **place, "ranked_in": name}
    return {}


def shard_of_pair(
    workspace: Workspace, run: str, shards: Iterable[int], query_id: str, train_id: int
) -> tuple[int, float] | None:
    """Return the shard whose file holds the pair, and the pair's score there; None where no file holds it."""
    numbers = {workspace.score_shard(run, shard).name: shard for shard in shards}
    paths = [path for path in matching(workspace.scores(run), "part-*.parquet") if path.name in numbers]
    statement = "SELECT filename, score FROM {files} WHERE query_id = ? AND train_id = ?"
    rows = select_rows(workspace, paths, statement, [query_id, train_id])
    return (numbers[rows[0][0].rsplit("/", 1)[-1]], rows[0][1]) if rows else None


def planned_shard(
    workspace: Workspace,
    candidates: AnyPath,
    shards: dict[int, int],
    queries: list[str],
    query_id: str,
    train_id: int,
) -> int | None:
    """Find the shard of a pair by counting: the shards of a block take its samples in ascending order.

    None where the pair is no candidate, or the candidates are not as many as planned.
    """
    statement = """
        SELECT count(*), count(*) FILTER (train_id <= $train_id),
               count(*) FILTER (train_id = $train_id AND query_id = $query_id)
        FROM {files} WHERE query_id IN (SELECT unnest($queries))
    """
    values = {"query_id": query_id, "train_id": train_id, "queries": queries}
    total, before, mine = select_rows(workspace, [candidates], statement, values)[0]
    if mine and total == sum(shards.values()):
        for shard, pairs in sorted(shards.items()):
            before -= pairs
            if before <= 0:
                return shard
    return None
