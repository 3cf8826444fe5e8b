"""Thousands of small score shards become a few large files of rank labels, sorted by query and rank.

A part holds all rows of some queries, is named after the shards that it was made from, and is never changed. The list
of a run's parts (`compaction.json`) replaces its shards in one rename, and no shard is deleted before `vacuum`, so a
reader sees each row once, from the old files or from the new, and a crash leaves parts that the next start finds.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_schemas import tables
from storage_schemas.commit import Manifest, commit, committed, input_key
from storage_schemas.database import duckdb_type, file_list, literal, open_database, rows_of
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, file_sha256, write_atomically
from storage_schemas.runs.attempts import ShardState
from storage_schemas.runs.ledger import (
    Derived,
    derive,
    read_compaction,
    read_labelling,
)
from storage_schemas.runs.records import Compaction, Negatives, Part
from storage_schemas.table import damaged
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace

PART_ROWS = 4_000_000
MEMORY_GIGABYTES = 3.0  # of all threads together; what does not fit is spilled
_WRITER = "FORMAT parquet, COMPRESSION zstd, PARQUET_VERSION v2, DICTIONARY_SIZE_LIMIT 2000"
# Columns of numbers are not worth a dictionary, and trying one costs a fifth of the time; query_id is far below.


class RunUnfinished(StoreError):
    """Some score shards of the run are not committed."""


@dataclass(frozen=True)
class _Group:
    """Queries that will lie in one part, by query_id, each with its block and its rows."""

    number: int
    queries: list[tuple[str, int, int]]

    @property
    def rows(self) -> int:
        return sum(pairs for _, _, pairs in self.queries)


def compact(
    workspace: Workspace,
    run: str,
    *,
    without: frozenset[str] = frozenset(),
    incomplete: bool = False,
    negatives: Negatives | None = None,
    part_rows: int = PART_ROWS,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda rows: None,
    derived: Derived | None = None,
) -> list[Part]:
    """Write rank labels of all rows of a finished run into large sorted files; files that are there already are reused.

    rank 1 = highest score of the query, ties by train_id; rank_label = rank / candidates of the query. Where negatives
    are tied, all scores that are not above 0 have the last rank and the label 1; their order in the file is the same.
    Candidates that the run had to leave out have no rank, and the others' ranks close up.

    Args:
        without: queries whose rows are left out; such parts serve a snapshot only, not the run.
        incomplete: take the rows of the shards that are done; such parts serve a snapshot only, too.
        negatives: as in the run's labelling unless given; then such parts serve a snapshot only, too.
        advance: called with the rows of each part when it is there.
        derived: what `derive` gave of the run, where it was asked already.

    Raises:
        RunUnfinished: shards are missing, or hold other rows than planned.
    """
    ledger, samples_left_out, manifests = derived or derive(workspace, run)
    state = dict(zip(ledger["shard"].to_pylist(), ledger["state"].to_pylist(), strict=True))
    open_shards = sorted(shard for shard, is_ in state.items() if is_ != ShardState.done)
    if open_shards and (not incomplete or len(open_shards) == len(state)):
        raise RunUnfinished(
            f"run {run}: {len(open_shards)} of {len(state)} score shards are not done "
            f"(first: {open_shards[0]}): {command(workspace, f'retry {run}')} computes them"
        )
    shards = _Shards.of(workspace, run, frozenset(open_shards), manifests)
    left_out = samples_left_out.num_rows
    groups = list(_groups(workspace, run, without, part_rows))
    workers = threads or os.cpu_count() or 1
    labelling = negatives or read_labelling(workspace, run).negatives

    def build(group: _Group) -> Part | None:
        memory = MEMORY_GIGABYTES / workers
        if open_shards or left_out:
            group = _counted(workspace, run, group, shards, memory, None if open_shards else left_out)
        if not group.queries:
            return None
        part = _build(workspace, run, group, shards, memory, labelling)
        advance(part.rows)
        return part

    # One thread a part: DuckDB's own threads gain less here, as rows that must stay in order are written by one.
    with ThreadPoolExecutor(workers) as pool:
        parts = [part for part in pool.map(build, groups) if part is not None]
    of_run = not without and not open_shards and negatives is None
    if of_run and read_compaction(workspace, run) != Compaction(parts=parts):
        content = Compaction(parts=parts).model_dump_json(indent=2).encode() + b"\n"
        write_atomically(workspace.compaction(run), content)
    return parts


@dataclass(frozen=True)
class _Shards:
    """The score shards of each block of queries, and the sha256 of those that are committed, by their path."""

    of_block: dict[int, list[int]]
    digests: dict[AnyPath, str]

    @classmethod
    def of(
        cls, workspace: Workspace, run: str, without: frozenset[int], manifests: Mapping[AnyPath, Manifest]
    ) -> _Shards:
        plan = tables.read(workspace.plan_shards(run), tables.PLAN_SHARDS).to_pydict()
        found: dict[int, list[int]] = {}
        for shard, block in zip(plan["shard"], plan["query_block"], strict=True):
            found.setdefault(block, [])
            if shard not in without:
                found[block].append(shard)
        return cls(found, {path: manifest.sha256 for path, manifest in manifests.items()})


def _groups(workspace: Workspace, run: str, without: frozenset[str], part_rows: int) -> Iterator[_Group]:
    """Yield all queries but those `without`, by query_id, in groups of about `part_rows` rows."""
    planned = tables.read(workspace.plan_queries(run), tables.PLAN_QUERIES).sort_by("query_id").to_pylist()
    rows, number = 0, 0
    group: list[tuple[str, int, int]] = []
    for query in planned:
        # Where a part ends depends on all queries of the run, so that leaving some out touches only their parts.
        if rows and rows + query["pairs"] > part_rows:
            if group:
                yield _Group(number, group)
            rows, number, group = 0, number + 1, []
        rows += query["pairs"]
        if query["query_id"] not in without and query["pairs"]:
            group.append((query["query_id"], query["query_block"], query["pairs"]))
    if group:
        yield _Group(number, group)


def _counted(
    workspace: Workspace, run: str, group: _Group, shards: _Shards, memory: float, left_out: int | None
) -> _Group:
    """Return the group with the candidates that its queries really have.

    Args:
        left_out: how many samples each query may lack; any number where None.

    Raises:
        RunUnfinished: a query lacks more.
    """
    with open_database(workspace, memory_gigabytes=memory, threads=1) as connection:
        sources = " UNION ALL ".join(_sources(workspace, run, group, shards, connection))
        if not sources:
            return _Group(group.number, [])
        rows = connection.execute(f"SELECT query_id, count(*) FROM ({sources}) GROUP BY ALL").fetchall()
    counts = {str(query_id): int(count) for query_id, count in rows}
    for query_id, _, planned in group.queries:
        if left_out is not None and planned - counts.get(query_id, 0) > left_out:
            raise RunUnfinished(
                f"run {run}: query {query_id} has {counts.get(query_id, 0)} of {planned} candidates, and only "
                f"{left_out} samples are quarantined: {_remedy(workspace, run)}"
            )
    return _Group(group.number, [(name, block, counts[name]) for name, block, _ in group.queries if name in counts])


def _remedy(workspace: Workspace, run: str) -> str:
    return f"{command(workspace, 'verify')}, then {command(workspace, f'retry {run}')}"


def _build(
    workspace: Workspace,
    run: str,
    group: _Group,
    shards: _Shards,
    memory: float,
    negatives: Negatives,
) -> Part:
    """Make one part, unless it is there."""
    numbers = sorted({shard for _, block, _ in group.queries for shard in shards.of_block[block]})
    content = [
        (shard, sha256) for shard in numbers if (sha256 := shards.digests.get(workspace.score_shard(run, shard)))
    ]
    labelling = [] if negatives == "keep" else [negatives]  # keys of earlier releases know no other
    key = input_key("ranks", run, group.queries, content, *labelling, table=tables.RANKS)
    path = workspace.ranks(run) / f"part-{group.number:05d}-{key}.parquet"
    manifest = committed(path, key)
    if manifest is None:
        started = time.monotonic()

        def write(temporary: Path) -> None:
            _write_ranks(workspace, run, group, shards, temporary, memory, negatives)
            written = pq.read_table(temporary, columns=["score", "rank"], partitioning=None)
            rows = written.num_rows
            if rows != group.rows:
                raise RunUnfinished(
                    f"run {run}: {path.name} would hold {rows} rows, its plan says {group.rows}: "
                    f"{_remedy(workspace, run)}"
                )
            # No database promises the order of what it writes; everything that reads parts relies on it.
            if not _in_order(written["score"].to_numpy(), written["rank"].to_numpy(), group, negatives):
                raise RunUnfinished(
                    f"run {run}: its shards do not hold the planned number of candidates of each query: "
                    f"{_remedy(workspace, run)}"
                )

        manifest = commit(path, write, key=key, rows=group.rows, started=started, table=tables.RANKS)
    return Part(
        run=run,
        path=workspace.relative(path),
        rows=manifest.rows,
        queries=len(group.queries),
        first_query=group.queries[0][0],
        last_query=group.queries[-1][0],
        sha256=manifest.sha256,
        negatives=negatives,
    )


def _in_order(scores: NDArray[np.float64], ranks: NDArray[np.int32], group: _Group, negatives: Negatives) -> bool:
    """Return whether the rows are the group's queries in their order, each from the highest score to the lowest."""
    pairs = np.array([pairs for _, _, pairs in group.queries])
    places = np.concatenate([np.arange(1, each + 1) for each in pairs])
    if negatives == "keep":
        return np.array_equal(ranks, places)
    # Ties share a rank: only their scores show that none of them is in a wrong place.
    rises = (scores[1:] > scores[:-1]) & (places[1:] > 1)
    return not rises.any() and np.array_equal(ranks, np.where(scores <= 0, np.repeat(pairs, pairs), places))


def _write_ranks(
    workspace: Workspace,
    run: str,
    group: _Group,
    shards: _Shards,
    destination: Path,
    memory: float,
    negatives: Negatives,
) -> None:
    with open_database(workspace, memory_gigabytes=memory, threads=1) as connection:
        query_ids, _, pairs = zip(*group.queries, strict=True)
        starts = [0, *itertools.accumulate(pairs[:-1])]
        numbers = pa.array(range(len(pairs)), pa.int32())
        planned = pa.table({"query_id": query_ids, "number": numbers, "pairs": pairs, "start": starts})
        connection.register("given", planned)
        connection.execute("CREATE TABLE planned AS SELECT * FROM given")
        # The rows stream past `planned` in their order, however few they are.
        connection.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
        sources = " UNION ALL ".join(_sources(workspace, run, group, shards, connection))
        rank = "(place - start)"
        if negatives == "tie":
            # A place outside of the query's own stays as it is: the check of the written file refuses it.
            rank = f"(CASE WHEN score <= 0 AND {rank} BETWEEN 1 AND pairs THEN pairs ELSE {rank} END)"
        values = {"rank": rank, "rank_label": f"{rank} / pairs"}
        columns = ", ".join(
            f"{values.get(field.name, field.name)}::{duckdb_type(field.type)} AS {field.name}"
            for field in tables.RANKS.schema
        )
        scored = ", ".join(name for name in tables.SCORES.schema.names if name != "query_id")
        # One sort: the place in all rows less the place where the query starts is the rank. Numbers stand for the
        # queries in it, which compare faster than text.
        connection.execute(f"""
            COPY (
                SELECT {columns} FROM (
                    SELECT number, {scored},
                           row_number() OVER (ORDER BY number, score DESC, train_id) AS place
                    FROM ({sources}) JOIN planned USING (query_id)
                ) JOIN planned USING (number)
            ) TO {literal(str(destination))}
            ({_WRITER}, KV_METADATA {{schema_version: {literal(tables.RANKS.metadata["schema_version"])}}})
        """)


def _sources(
    workspace: Workspace, run: str, group: _Group, shards: _Shards, connection: duckdb.DuckDBPyConnection
) -> Iterator[str]:
    """Yield SQL for the group's rows: from shards or, for queries whose shards are vacuumed, from earlier parts."""
    columns = ", ".join(tables.SCORES.schema.names)
    raw: list[AnyPath] = []
    from_parts: list[str] = []
    whole: dict[int, bool] = {}
    for query_id, block, _ in group.queries:
        if block not in whole:
            paths = [workspace.score_shard(run, shard) for shard in shards.of_block[block]]
            whole[block] = all(path.exists() for path in paths)
            raw += paths if whole[block] else []
        if not whole[block]:
            from_parts.append(query_id)
    if raw:
        chosen = ""
        if from_parts:  # a shard may hold rows of queries that come from a part
            connection.execute("CREATE TABLE elsewhere AS SELECT unnest(?) AS query_id", [from_parts])
            chosen = " WHERE query_id NOT IN (FROM elsewhere)"
        _check_digests({path: shards.digests[path] for path in raw if path in shards.digests})
        yield f"SELECT {columns} FROM {rows_of(tables.SCORES, file_list(raw))}{chosen}"
    if from_parts:
        compaction = read_compaction(workspace, run)
        held = {
            workspace.file(part.path): part.sha256
            for part in (compaction.parts if compaction else [])
            if any(part.first_query <= query_id <= part.last_query for query_id in from_parts)
        }
        _check_digests(held)
        connection.execute("CREATE TABLE vacuumed AS SELECT unnest(?) AS query_id", [from_parts])
        yield f"SELECT {columns} FROM {rows_of(tables.SCORES, file_list(held))} WHERE query_id IN (FROM vacuumed)"


def _check_digests(files: Mapping[AnyPath, str]) -> None:
    """Raise DamagedTable where a file is not what was committed: DuckDB reads a flipped bit as another score."""
    for path, sha256 in files.items():
        if file_sha256(path) != sha256:
            raise damaged(path, ValueError("its sha256 is another than when it was committed"))
