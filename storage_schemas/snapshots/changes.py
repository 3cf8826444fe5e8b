"""Which queries' first samples differ between two snapshots, as SQL over the files of rank labels."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from storage_schemas import tables
from storage_schemas.database import duckdb_type, file_list, literal, open_database, rows_of
from storage_schemas.runs.ledger import read_run
from storage_schemas.snapshots.snapshots import Snapshot, read_snapshot
from storage_schemas.tombstones import Tombstones, read_tombstones, removed_ids
from storage_schemas.workspace import Workspace

DEFAULT_K = 10
MEMORY_GIGABYTES = 2.0


def answers_changed(workspace: Workspace, before: str, after: str, k: int = DEFAULT_K) -> pa.Table:
    """Return a row for each query whose first k samples differ between two snapshots, by query_id.

    Samples that are taken down are in none. Files that both snapshots have are not read; of others the first ranks are.

    Returns:
        Rows of `tables.ANSWERS_CHANGED`.

    Raises:
        NotPublished: there is no such snapshot.
    """
    snapshots = read_snapshot(workspace, before), read_snapshot(workspace, after)
    statement = changes_sql(workspace, *snapshots, k, read_tombstones(workspace))
    with open_database(workspace, memory_gigabytes=MEMORY_GIGABYTES, threads=2) as connection:
        rows = connection.execute(f"{statement} ORDER BY query_id").to_arrow_table()
    return rows.cast(tables.ANSWERS_CHANGED.schema)


def changes_sql(workspace: Workspace, old: Snapshot, new: Snapshot, k: int, tombstones: Tombstones) -> str:
    """Return SQL for the rows of `answers_changed`, in any order."""
    samples = [read_run(workspace, each.runs[-1]).samples for each in (old, new)]
    shared = {part.path for part in old.parts} & {part.path for part in new.parts}
    if samples[0] != samples[1]:
        shared = set()  # of an imported run, whose samples nobody knows
    tops = [
        _top(workspace, each, shared, k, removed_ids(workspace, table, tombstones).tolist())
        for each, table in zip((old, new), samples, strict=True)
    ]
    # Of other samples an image is known by its bytes: its number after stands for the one before, where it has one.
    same = "SELECT query_id, place, train_id, train_id AS of_after FROM old_top"
    if samples[0] != samples[1] and samples[0] is not None and samples[1] is not None:
        one, two = (_numbered(workspace, table) for table in samples if table is not None)
        same = f"""
            SELECT query_id, place, old_top.train_id, two.train_id AS of_after
            FROM old_top LEFT JOIN ({one}) AS one USING (train_id) LEFT JOIN ({two}) AS two USING (image_sha256, copy)
        """
    values = {"before": literal(old.snapshot), "after": literal(new.snapshot), "k": str(k)}
    columns = ", ".join(
        f"CAST({values.get(field.name, field.name)} AS {duckdb_type(field.type)}) AS {field.name}"
        for field in tables.ANSWERS_CHANGED.schema
    )
    return f"""
        WITH old_top AS ({tops[0]}), new_top AS ({tops[1]}), same AS ({same}),
        pairs AS (
            SELECT coalesce(same.query_id, new_top.query_id) AS query_id, same.place AS was, same.train_id AS old_id,
                   new_top.place AS is_now, new_top.train_id AS new_id
            FROM same FULL JOIN new_top ON same.query_id = new_top.query_id AND same.of_after = new_top.train_id
        ),
        changes AS (
            SELECT query_id,
                   coalesce(list(new_id ORDER BY is_now) FILTER (was IS NULL), []) AS entered,
                   coalesce(list(old_id ORDER BY was) FILTER (is_now IS NULL), []) AS dropped,
                   count(*) FILTER (was <> is_now) AS moved,
                   count(*) FILTER (was = is_now) + moved AS common,
                   common / greatest(count(was), count(is_now)) AS overlap,
                   CASE WHEN count(was) = 0 THEN 'new' WHEN count(is_now) = 0 THEN 'gone'
                        WHEN len(entered) + len(dropped) > 0 THEN 'changed' ELSE 'reordered' END AS change
            FROM pairs GROUP BY query_id
        )
        SELECT {columns} FROM changes WHERE len(entered) + len(dropped) + moved > 0
    """


def _top(workspace: Workspace, snapshot: Snapshot, left_out: set[str], k: int, removed: Sequence[int]) -> str:
    """Return SQL for the first k samples of each query, but for queries of some files."""
    files = [workspace.file(part.path) for part in snapshot.parts if part.path not in left_out]
    if not files:
        return "SELECT NULL::VARCHAR AS query_id, NULL::BIGINT AS train_id, NULL::BIGINT AS place WHERE false"
    shown = f"AND train_id NOT IN ({', '.join(map(str, removed))})" if removed else ""
    # Those that are taken down may have had the first ranks.
    return f"""
        SELECT query_id, train_id,
               row_number() OVER (PARTITION BY query_id ORDER BY rank, score DESC, train_id) AS place
        FROM {rows_of(tables.RANKS, file_list(files))} WHERE rank <= {k + len(removed)} {shown} QUALIFY place <= {k}
    """


def _numbered(workspace: Workspace, samples: str) -> str:
    """Return SQL that numbers the samples of the same bytes."""
    source = rows_of(tables.SAMPLES, file_list([workspace.file(samples)]))
    copy = "row_number() OVER (PARTITION BY image_sha256 ORDER BY train_id)"
    return f"SELECT train_id, image_sha256, {copy} AS copy FROM {source}"
