"""Scores in the layout of the FastGDA release: `influence_train.pkl`, as its `merge_train.py` writes it.

A pickle of `{split: {"influence_subset", "rank_influence_subset", "rank"}}` whose three arrays are (queries,
candidates): the scores in the order of the candidates, the argsort of the negated scores, and the training samples,
the most influential first. The split, `random` in the release, is how the candidates were chosen. The files of single
queries, `influence_<i>.pkl`, and of queries that are scored against all samples, `{"influence": (N,), "rank": (N,)}`,
have other layouts.

A pickle is a program. Reading one here runs none of it: whatever it names is looked up in a short table of classes of
`plain_pickle` that stand for numpy's, so not even numpy's own unpickling, which trusts what it is given, sees the file.
"""

from __future__ import annotations

import json
import pickle
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_schemas import tables
from storage_schemas.commit import TableCommit, commit, commit_tables, committed, input_key
from storage_schemas.database import file_list, open_database
from storage_schemas.files import replace_through, write_atomically
from storage_schemas.publishing.export import check_absent
from storage_schemas.publishing.plain_pickle import BadRelease
from storage_schemas.publishing.release_pickle import ORDER, SCORES, TRAIN_IDS, ScoredPairs, read_scores
from storage_schemas.runs.ledger import done_shards, read_run, write_ledger, write_plan
from storage_schemas.runs.records import Part, RunRecord
from storage_schemas.snapshots.compaction import MEMORY_GIGABYTES, compact
from storage_schemas.tombstones import removed_ids
from storage_schemas.workspace import Workspace

SPLIT = "random"  # merge_train.py writes no other
SHARDS_AT_ONCE = 64  # whose folder is synced once
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")  # as `name` of a configuration


def export_release(workspace: Workspace, run: str, destination: Path) -> None:
    """Write a finished run as `influence_train.pkl` of the FastGDA release; see the module for its layout.

    Queries are ordered by split, train, validation, test, then as planned, as the release's training takes its rows by
    number: `[0:train_size]`, `[val_start:val_end]`. A JSON file beside it (`rows_beside`) names the query of each row,
    its split, and these numbers; queries of an imported run have no splits. Candidates are ordered by neighbor_rank
    where the run has a candidates file, else by train_id. Scores are float64, the rest int64; equal scores are ordered
    by train_id, as in `ranks`. It is not the release's file of a single query, nor `{"influence": (N,), "rank": (N,)}`.
    Samples that are taken down are left out. Memory holds all rows, at about 50 bytes each. Read it with numpy 1.26 or
    later.

    Args:
        destination: a file that is not there yet; the one beside it must not be there either. Its folder is made.

    Raises:
        BadRelease: queries differ in their number of candidates, scored pairs are no candidates, or a score is not
            finite.
        DestinationTaken: one of the two files is there.
        UnknownRun, RunUnfinished: there is no such run, or it has shards that are not done.
    """
    check_absent(destination)
    check_absent(rows_beside(destination))
    record = read_run(workspace, run)
    parts = compact(workspace, run)
    planned, splits = _by_split(workspace, record)
    removed = removed_ids(workspace, record.samples).tolist()
    if removed:
        planned = _pairs_left(workspace, parts, planned, removed)
    arrays = _arrays(workspace, record, parts, planned, removed)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            pickle.dump({SPLIT: arrays}, file, protocol=4)

    replace_through(destination, write, lambda temporary: None)
    described = {"run": run, "query_ids": planned["query_id"].to_pylist(), **_slices(splits)}
    write_atomically(rows_beside(destination), json.dumps(described, indent=2, ensure_ascii=False).encode() + b"\n")


def rows_beside(pickle_path: Path) -> Path:
    """Return the path of the file that names the query of each row of an exported file."""
    return pickle_path.with_name(f"{pickle_path.stem}.rows.json")


def _by_split(workspace: Workspace, record: RunRecord) -> tuple[pa.Table, list[str] | None]:
    """Return the planned queries in the order of the export, and each one's split; None where the run has no query set.

    Queries of the twin test are in no split, and left out.
    """
    planned = tables.read(workspace.plan_queries(record.run), tables.PLAN_QUERIES)
    if record.queries is None:
        return planned, None
    found = tables.read(workspace.file(record.queries), tables.QUERIES, columns=["query_id", "split"]).to_pydict()
    split_of = dict(zip(found["query_id"], found["split"], strict=True))
    query_ids = planned["query_id"].to_pylist()
    rows = (row for row in range(len(query_ids)) if split_of[query_ids[row]] in _SPLITS)
    order = sorted(rows, key=lambda row: _SPLITS.index(split_of[query_ids[row]]))
    return planned.take(order), [split_of[query_ids[row]] for row in order]


_SPLITS = ("train", "validation", "test")


def _slices(splits: list[str] | None) -> dict[str, Any]:
    """Return the split of each row and the numbers that the release's training is given."""
    if splits is None:
        return {}
    train, validation = (splits.count(split) for split in _SPLITS[:2])
    return {"splits": splits, "train_size": train, "val_start": train, "val_end": train + validation}


def import_release(
    workspace: Workspace,
    pickle_path: Path,
    *,
    name: str,
    teacher: str,
    query_ids: list[str] | None = None,
    samples: str | None = None,
    rejected_samples: str | None = None,
    queries: str | None = None,
    neighbors: Neighbors | None = None,
) -> str:
    """Write `influence_train.pkl` or `influence_test.pkl` as a run, a score shard for each of its queries.

    Nothing that the file holds is executed. A second import of the same file finds the same run and adds what is
    missing in it, so one that was killed goes on.

    Args:
        name: the run's name starts with it.
        teacher: the method that made the scores.
        query_ids: of the rows, in order; q00000, q00001, ... unless given.
        samples: the samples table that the train_ids number, relative to the workspace, if it has one.
        rejected_samples, queries: the same of what was rejected beside them, and of the query set.
        neighbors: of the file's queries, among which its candidates are; they become the run's candidates.

    Returns:
        The name of the run.

    Raises:
        BadRelease: the file is no such pickle, names anything but numeric numpy arrays, is damaged or contradicts
            itself, or an argument does not fit it.
    """
    release, sha256 = read_scores(pickle_path)
    count, candidates = release.scores.shape
    names = [f"q{row:05d}" for row in range(count)] if query_ids is None else query_ids
    _check_arguments(workspace, release, name, names, samples)
    joined = [] if queries is None else [queries, neighbors is not None]
    run = f"{name}-{input_key('release', sha256, teacher, names, samples, *joined, table=tables.SCORES)[:10]}"
    if neighbors is not None:
        _write_candidates(workspace, run, pickle_path, release, names, neighbors)
    keys = [input_key("release", sha256, row, query_id, table=tables.SCORES) for row, query_id in enumerate(names)]
    record = RunRecord(
        run=run,
        name=name,
        teacher=teacher,
        created_at=datetime.now(UTC),
        shards=count,
        pairs=count * candidates,
        samples=samples,
        rejected_samples=rejected_samples,
        queries=queries,
        candidates=workspace.relative(workspace.candidates(run)) if neighbors is not None else None,
        config={"imported_from": pickle_path.name, "sha256": sha256, "split": release.split},
    )
    numbers, pairs = range(count), [candidates] * count
    write_plan(
        workspace,
        record,
        tables.PLAN_SHARDS.rows(shard=numbers, input_key=keys, query_block=numbers, pairs=pairs),
        tables.PLAN_QUERIES.rows(query_id=names, query_block=numbers, pairs=pairs),
    )
    done = done_shards(workspace, run)
    missing = [row for row in numbers if row not in done]
    for start in range(0, len(missing), SHARDS_AT_ONCE):
        batch = missing[start : start + SHARDS_AT_ONCE]
        commit_tables([_shard(workspace, run, release, row, names[row], keys[row]) for row in batch])
    write_ledger(workspace, run)
    return run


@dataclass(frozen=True)
class Neighbors:
    """The training samples near each query.

    train_ids: (queries, at least as many as candidates), nearest first; path: of their file, for messages.
    similarity: returns the cosine of a query, by its row, and some training samples, (n,).
    """

    path: Path
    train_ids: NDArray[np.integer[Any]]
    similarity: Callable[[int, NDArray[np.int64]], NDArray[np.float32]]


def _write_candidates(
    workspace: Workspace,
    run: str,
    pickle_path: Path,
    release: ScoredPairs,
    names: Sequence[str],
    neighbors: Neighbors,
) -> None:
    """Commit the nearest neighbours, of which a file has the scores, as the run's candidates, unless they are there."""
    queries, candidates = release.train_ids.shape
    path, started = workspace.candidates(run), time.monotonic()
    if committed(path, run) is not None:
        return
    if neighbors.train_ids.shape[0] != queries or neighbors.train_ids.shape[1] < candidates:
        raise BadRelease(
            f"{neighbors.path} has neighbours of shape {neighbors.train_ids.shape}, {pickle_path} has scores of "
            f"{release.train_ids.shape}: fetch both again"
        )

    def of_queries() -> Iterator[pa.Table]:
        for row in range(queries):
            near = neighbors.train_ids[row, :candidates].astype(np.int64)
            if not np.array_equal(np.sort(near), np.sort(release.train_ids[row])):
                raise BadRelease(
                    f"{pickle_path}: row {row} scores other samples than the {candidates} nearest of {neighbors.path}: "
                    "fetch both again"
                )
            yield tables.CANDIDATES.rows(
                query_id=[names[row]] * candidates,
                train_id=near,
                neighbor_rank=np.arange(1, candidates + 1),
                similarity=neighbors.similarity(row, near),
            )

    commit(
        path,
        lambda temporary: tables.CANDIDATES.write(temporary, of_queries(), {"input_key": run}),
        key=run,
        rows=queries * candidates,
        started=started,
        table=tables.CANDIDATES,
    )


def _pairs_left(workspace: Workspace, parts: Sequence[Part], planned: pa.Table, removed: Sequence[int]) -> pa.Table:
    """Return the planned queries with the pairs that are left where some samples are taken down."""
    with open_database(workspace, memory_gigabytes=MEMORY_GIGABYTES, threads=2) as connection:
        connection.register("planned", planned.append_column("place", pa.array(range(planned.num_rows), pa.int64())))
        files = file_list(workspace.file(part.path) for part in parts)
        gone = f"""
            SELECT query_id, count(*) AS gone FROM read_parquet({files})
            WHERE train_id IN ({", ".join(map(str, removed))}) GROUP BY query_id
        """
        columns = "query_id, query_block, (pairs - coalesce(gone, 0))::BIGINT AS pairs"
        rows = connection.execute(f"SELECT {columns} FROM planned LEFT JOIN ({gone}) USING (query_id) ORDER BY place")
        return rows.to_arrow_table()


def _arrays(
    workspace: Workspace, record: RunRecord, parts: Sequence[Part], planned: pa.Table, removed: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """Return the three arrays of the layout; the rows come from SQL in the order of queries and candidates."""
    queries, candidates = _shape(record.run, planned)
    shape, rows = (queries, candidates), queries * candidates
    numbers, train_ids = np.empty(rows, np.int32), np.empty(rows, np.int64)
    scores, places = np.empty(rows), np.empty(rows, np.int64)
    filled = 0
    for batch in _ordered_rows(workspace, record, parts, planned, removed):
        here = slice(filled, filled + batch.num_rows)
        filled += batch.num_rows
        if filled > rows:
            break
        numbers[here], train_ids[here] = batch["number"], batch["train_id"]
        scores[here], places[here] = batch["score"], batch["place"]
    order = np.full(shape, -1)
    if filled == rows:
        np.put_along_axis(order, places.reshape(shape), np.arange(candidates)[None], axis=1)
    if (order < 0).any() or (numbers.reshape(shape) != np.arange(queries)[:, None]).any():
        raise BadRelease(
            f"run {record.run}: {record.candidates} does not hold each of its {rows} scored pairs once, so they have "
            "no order: export it as parquet or datasets"
        )
    if not np.isfinite(scores).all():
        raise BadRelease(f"run {record.run} has scores that are not finite: export it as parquet or datasets")
    return {
        SCORES: scores.reshape(shape),
        ORDER: order,
        TRAIN_IDS: np.take_along_axis(train_ids.reshape(shape), order, axis=1),
    }


def _shape(run: str, planned: pa.Table) -> tuple[int, int]:
    """Return the number of queries, and of the candidates that each of them has."""
    rows = planned.to_pylist()
    if not rows or not rows[0]["pairs"]:
        raise BadRelease(f"run {run} has no scored pairs to export")
    first = rows[0]
    for other in rows:
        if other["pairs"] != first["pairs"]:
            raise BadRelease(
                f"run {run}: query {first['query_id']!r} has {first['pairs']} candidates and {other['query_id']!r} has "
                f"{other['pairs']}, the release's arrays need the same number: export it as parquet or datasets"
            )
    return len(rows), first["pairs"]


def _ordered_rows(
    workspace: Workspace, record: RunRecord, parts: Sequence[Part], planned: pa.Table, removed: Sequence[int]
) -> Iterator[pa.RecordBatch]:
    """Yield the scored pairs by query, as given, and candidate, with the place (from 0) in the query's ranking."""
    with open_database(workspace, memory_gigabytes=MEMORY_GIGABYTES, threads=2) as connection:
        numbers = pa.array(range(planned.num_rows), pa.int32())
        connection.register("planned", planned.select(["query_id"]).append_column("number", numbers))
        shown = f"WHERE train_id NOT IN ({', '.join(map(str, removed))})" if removed else ""
        # Not by rank, which ties may share.
        places = f"""
            SELECT query_id, train_id, score,
                   row_number() OVER (PARTITION BY query_id ORDER BY score DESC, train_id) - 1 AS place
            FROM read_parquet({file_list(workspace.file(part.path) for part in parts)}) {shown}
        """
        join, order = "", "train_id"
        if record.candidates is not None:
            candidates = file_list([workspace.file(record.candidates)])
            join = f"JOIN read_parquet({candidates}) AS candidates USING (query_id, train_id)"
            order = "neighbor_rank, train_id"
        rows = connection.sql(f"""
            SELECT number, train_id, score, place
            FROM ({places}) AS ranks JOIN planned USING (query_id) {join}
            ORDER BY number, {order}
        """)
        yield from rows.to_arrow_reader(tables.RANKS.row_group_rows)


def _check_arguments(
    workspace: Workspace, release: ScoredPairs, name: str, query_ids: Sequence[str], samples: str | None
) -> None:
    if not _NAME.fullmatch(name):
        raise BadRelease(f"name {name!r} must be at most 40 of a-z, 0-9, - and _, and start with a letter or digit")
    if len(query_ids) != len(release.scores):
        raise BadRelease(
            f"query_ids has {len(query_ids)} names, the file has {len(release.scores)} queries: give one for each row"
        )
    query_id, times = Counter(query_ids).most_common(1)[0]
    if times > 1:
        raise BadRelease(f"query_ids names {query_id!r} {times} times: give each query its own")
    if samples is None:
        return
    try:
        with workspace.file(samples).open("rb") as file:
            count = pq.read_metadata(file).num_rows
    except FileNotFoundError:
        raise BadRelease(f"{workspace.root} has no samples table {samples}: name one that it has, or none") from None
    highest = int(release.train_ids.max())
    if highest >= count:
        raise BadRelease(
            f"{samples} has {count} training samples, the file scores train_id {highest}: name the table of the data "
            "set that was scored"
        )


def _shard(workspace: Workspace, run: str, release: ScoredPairs, row: int, query_id: str, key: str) -> TableCommit:
    started = time.monotonic()
    train_ids = release.train_ids[row]
    rows = tables.SCORES.rows(
        query_id=[query_id] * len(train_ids),
        train_id=train_ids.astype(np.int64),
        score=release.scores[row][release.order[row]].astype(np.float64),
    )
    return TableCommit(workspace.score_shard(run, row), rows, tables.SCORES, key, started)
