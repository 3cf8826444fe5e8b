"""The score store at 100 million rows beside Polars on the same files; prints a Markdown table.

Each row of the table is measured in a process of its own, which reports its peak memory. Making the scores up is not
timed. Polars gets the same rows in the same pieces; it writes no manifests, takes no checksums and syncs nothing.

Run: python benchmarks/score_store.py
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from storage_schemas import tables
from storage_schemas.commit import TableCommit, commit_tables, input_key
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.ledger import rebuild_ledgers, write_plan
from storage_schemas.runs.records import RunRecord
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.sql.views import connect
from storage_schemas.workspace import Workspace

RUN = "benchmark"
SAMPLES = 118_287  # as many as MS COCO 2017 has for training
BATCH = 64  # shards whose folder is synced once
LOOKS = 40  # at the tables that answer in milliseconds
TOTAL = "SELECT count(*) FROM scores"
TOP = "SELECT train_id, score, rank FROM ranks WHERE query_id = ? AND rank <= 10 ORDER BY rank"
INFLUENTIAL = """
SELECT train_id, sum(score) AS influence FROM scores GROUP BY train_id ORDER BY influence DESC, train_id LIMIT 10
"""


def query_id(number: int) -> str:
    return f"q{number:05d}"


def shards(queries: int, candidates: int) -> Iterator[pa.Table]:
    """Scores of one query after the other, whose candidates are a draw from the samples."""
    random = np.random.default_rng(0)
    for number in range(queries):
        train_ids = np.sort(random.choice(SAMPLES, candidates, replace=False, shuffle=False))
        scores = random.standard_normal(candidates)
        yield tables.SCORES.rows(query_id=[query_id(number)] * candidates, train_id=train_ids, score=scores)


def commit(workspace: Workspace, queries: int, candidates: int) -> float:
    numbers = range(queries)
    keys = [input_key(number) for number in numbers]
    pairs = [candidates] * queries
    record = RunRecord(
        run=RUN,
        name=RUN,
        teacher="none",
        created_at=datetime.now(UTC),
        shards=queries,
        pairs=queries * candidates,
        config={},
    )
    write_plan(
        workspace,
        record,
        tables.PLAN_SHARDS.rows(shard=numbers, input_key=keys, query_block=numbers, pairs=pairs),
        tables.PLAN_QUERIES.rows(query_id=[query_id(n) for n in numbers], query_block=numbers, pairs=pairs),
    )
    seconds = 0.0
    batch: list[TableCommit] = []
    for number, rows in enumerate(shards(queries, candidates)):
        path = workspace.score_shard(RUN, number)
        batch.append(TableCommit(path, rows, tables.SCORES, keys[number], time.monotonic()))
        if len(batch) == BATCH or number == queries - 1:
            started = time.perf_counter()
            commit_tables(batch)
            seconds += time.perf_counter() - started
            batch = []
    return seconds


def polars_commit(workspace: Workspace, queries: int, candidates: int) -> float:
    import polars as pl

    folder = Path(str(workspace.root)) / "polars"
    folder.mkdir()
    seconds = 0.0
    for number, rows in enumerate(shards(queries, candidates)):
        started = time.perf_counter()
        frame = pl.from_arrow(rows)
        assert isinstance(frame, pl.DataFrame)
        frame.write_parquet(folder / f"part-{number:05d}.parquet", compression="zstd")
        seconds += time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def ledger(workspace: Workspace, queries: int, candidates: int) -> float:
    started = time.perf_counter()
    assert rebuild_ledgers(workspace) == {RUN: queries}
    return time.perf_counter() - started


def polars_ledger(workspace: Workspace, queries: int, candidates: int) -> float:
    """The rows of each shard file from its footer, which is less than the ledger holds."""
    import polars as pl

    started = time.perf_counter()
    paths = sorted(Path(str(workspace.scores(RUN))).glob("part-*.parquet"))
    assert sum(pl.scan_parquet(path).select(pl.len()).collect().item() for path in paths) == queries * candidates
    return time.perf_counter() - started


def rank(workspace: Workspace, queries: int, candidates: int) -> float:
    started = time.perf_counter()
    parts = compact(workspace, RUN)
    seconds = time.perf_counter() - started
    assert sum(part.rows for part in parts) == queries * candidates
    publish_runs(workspace, [RUN])
    return seconds


def polars_rank(workspace: Workspace, queries: int, candidates: int) -> float:
    """The same parts of 400 queries, as sorting all rows at once does not fit the memory."""
    import polars as pl

    folder = Path(str(workspace.root)) / "polars"
    folder.mkdir()
    paths = sorted(Path(str(workspace.scores(RUN))).glob("part-*.parquet"))
    started = time.perf_counter()
    for number, start in enumerate(range(0, len(paths), 400)):
        place = pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("query_id")
        frame = (
            pl.scan_parquet(paths[start : start + 400])
            .sort("query_id", "score", "train_id", descending=[False, True, False])
            .with_columns(rank=place)
            .with_columns(rank_label=(pl.col("rank") / pl.len().over("query_id")).cast(pl.Float32))
        )
        frame.sink_parquet(folder / f"part-{number:05d}.parquet", compression="zstd")
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def median(look: Callable[[int], object]) -> float:
    """Seconds of one look, each at another query; the first ones, which fill caches, do not count."""
    seconds = []
    for number in range(LOOKS):
        started = time.perf_counter()
        look(number)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[5:])


def top(workspace: Workspace, queries: int, candidates: int) -> float:
    connection = connect(workspace.root, memory_gigabytes=4.0)

    def look(number: int) -> None:
        assert len(connection.execute(TOP, [query_id(number * 7919 % queries)]).fetchall()) == 10

    return median(look)


def top_cold(workspace: Workspace, queries: int, candidates: int) -> float:
    """The same with a new connection for each look, as `fastgda sql` makes one."""

    def look(number: int) -> None:
        with connect(workspace.root, memory_gigabytes=4.0) as connection:
            assert len(connection.execute(TOP, [query_id(number * 7919 % queries)]).fetchall()) == 10

    return median(look)


def _parts(workspace: Workspace) -> list[str]:
    snapshot = read_snapshot(workspace, read_published(workspace).snapshot)
    return [str(workspace.file(part.path)) for part in snapshot.parts]


def polars_top(workspace: Workspace, queries: int, candidates: int) -> float:
    import polars as pl

    parts = _parts(workspace)

    def look(number: int) -> None:
        chosen = (pl.col("query_id") == query_id(number * 7919 % queries)) & (pl.col("rank") <= 10)
        rows = pl.scan_parquet(parts).filter(chosen).select("train_id", "score", "rank").sort("rank").collect()
        assert rows.height == 10

    return median(look)


def total(workspace: Workspace, queries: int, candidates: int) -> float:
    connection = connect(workspace.root, memory_gigabytes=4.0)

    def look(number: int) -> None:
        assert connection.execute(TOTAL).fetchall() == [(queries * candidates,)]

    return median(look)


def polars_total(workspace: Workspace, queries: int, candidates: int) -> float:
    import polars as pl

    parts = _parts(workspace)

    def look(number: int) -> None:
        assert pl.scan_parquet(parts).select(pl.len()).collect().item() == queries * candidates

    return median(look)


def influential(workspace: Workspace, queries: int, candidates: int) -> float:
    connection = connect(workspace.root, memory_gigabytes=4.0)
    started = time.perf_counter()
    assert len(connection.execute(INFLUENTIAL).fetchall()) == 10
    return time.perf_counter() - started


def polars_influential(workspace: Workspace, queries: int, candidates: int) -> float:
    import polars as pl

    parts = _parts(workspace)
    started = time.perf_counter()
    rows = (
        pl.scan_parquet(parts)
        .group_by("train_id")
        .agg(influence=pl.col("score").sum())
        .sort("influence", "train_id", descending=[True, False])
        .head(10)
        .collect(engine="streaming")
    )
    seconds = time.perf_counter() - started
    assert rows.height == 10
    return seconds


Work = Callable[[Workspace, int, int], float]
WORKS: list[tuple[str, str, Work, Work | None]] = [
    ("commit the shards", "1 M rows/s", commit, polars_commit),
    ("ledger rebuild", "5 s", ledger, polars_ledger),
    ("rank labels of all rows, to Parquet", "20 s, 4 GB", rank, polars_rank),
    ("top-10 of a query", "20 ms", top, polars_top),
    ("top-10 of a query, connection included", "", top_cold, None),
    ("count of all rows", "50 ms", total, polars_total),
    ("10 most influential images over all queries", "2 s", influential, polars_influential),
]


def alone(work: Work, folder: Path, queries: int, candidates: int) -> tuple[float, float]:
    """Seconds and peak gigabytes of a work in a process of its own."""
    command = [sys.executable, __file__, "--work", work.__name__, "--folder", str(folder)]
    command += ["--queries", str(queries), "--candidates", str(candidates)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, gigabytes = json.loads(printed)
    return float(seconds), float(gigabytes)


def shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where to lay the files; a temporary folder unless given")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        seconds = globals()[given.work](Workspace(given.folder), given.queries, given.candidates)
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
        return
    rows = given.queries * given.candidates
    libraries = ", ".join(f"{name} {version(name)}" for name in ("duckdb", "pyarrow", "polars"))
    print(f"2 cores ({platform.machine()}), Python {platform.python_version()}, {libraries}")
    print(f"{rows:,} rows: {given.queries:,} queries x {given.candidates:,} candidates of {SAMPLES:,}\n")
    print("| work | to reach | here | peak GB | Polars | peak GB | Polars / here |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        for name, goal, ours, theirs in WORKS:
            seconds, peak = alone(ours, Path(scratch), given.queries, given.candidates)
            other = alone(theirs, Path(scratch), given.queries, given.candidates) if theirs else None
            here = shown(seconds) + (f", {rows / seconds / 1e6:.1f} M rows/s" if ours is commit else "")
            beside = f"{shown(other[0])} | {other[1]:.1f} | {other[0] / seconds:.1f}" if other else "| |"
            print(f"| {name} | {goal} | {here} | {peak:.1f} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
