"""Small published workspaces, written with the real commit protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from storage_schemas import tables
from storage_schemas.catalog import Published, ShardRecord, publish, write_ranks
from storage_schemas.commit import commit, commit_table
from storage_schemas.workspace import Workspace, part

KEY = "0123456789abcdef"
QUERIES = ("q0", "q1", "q2")


def write_table(path: Path, schema: pa.Schema, rows: list[dict[str, object]]) -> Path:
    commit_table(path, pa.Table.from_pylist(rows, schema=schema), schema, key=KEY, started=time.monotonic(), device="x")
    return path


def publish_run(
    root: Path,
    run: str = "run-1",
    *,
    queries: Sequence[str] = QUERIES,
    captions: Sequence[str] = ("a cat", "a dog"),
    samples: int = 4,
    extras: bool = False,
) -> Published:
    """Every query against every sample, in two score shards; `extras` adds metrics and checked pairs."""
    workspace = Workspace(root)
    pairs = [(query, train) for query in queries for train in range(samples)]
    sample_rows: list[dict[str, object]] = [
        {
            "train_id": train,
            "key": f"s{train}",
            "shard": "a.tar",
            "offset": 512,
            "size": 9,
            "captions": list(captions),
            "width": 8,
            "height": 8,
            "image_sha256": "0" * 64,
        }
        for train in range(samples)
    ]
    query_rows: list[dict[str, object]] = [
        {"query_id": query, "split": "test", "caption": captions[0], "image": b"png", "image_sha256": "0" * 64}
        for query in queries
    ]
    candidate_rows: list[dict[str, object]] = [
        {"query_id": query, "train_id": train, "neighbor_rank": train + 1, "similarity": 0.5} for query, train in pairs
    ]
    score_rows: list[dict[str, object]] = [
        {"query_id": query, "train_id": train, "score": float(train % 3)} for query, train in pairs
    ]
    scores = workspace.scores(run)
    half = len(pairs) // 2
    shards = [score_rows[:half], score_rows[half:]]
    for number, rows in enumerate(shards):
        write_table(part(scores, number), tables.SCORES, rows)
    commit(workspace.ranks(run), lambda path: write_ranks(scores, path), key=KEY, rows=len(pairs), started=0.0)
    exact, metrics = None, None
    if extras:
        exact = workspace.exact_check(run)
        write_table(part(exact, 0), tables.SCORES, score_rows[:2])
        metrics = write_table(
            workspace.metrics("m"),
            tables.METRICS,
            [
                {
                    "metric": "mAP",
                    "space": "tuned",
                    "split": "test",
                    "cutoff": 2,
                    "query_id": "",
                    "value": 0.5,
                    "standard_error": 0.1,
                    "queries": 3,
                }
            ],
        )

    def relative(path: Path) -> str:
        return str(path.relative_to(root))

    published = Published(
        run=run,
        teacher="abu_plus",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        samples=relative(write_table(workspace.samples("k"), tables.SAMPLES, sample_rows)),
        rejected_samples=relative(write_table(workspace.rejected_samples("k"), tables.REJECTED_SAMPLES, [])),
        queries=relative(write_table(workspace.queries(run), tables.QUERIES, query_rows)),
        candidates=relative(write_table(workspace.candidates(run), tables.CANDIDATES, candidate_rows)),
        scores=relative(scores),
        ranks=relative(workspace.ranks(run)),
        exact_check=relative(exact) if exact else None,
        metrics=relative(metrics) if metrics else None,
        shards=[
            ShardRecord(shard=number, path=relative(part(scores, number)), pairs=len(rows))
            for number, rows in enumerate(shards)
        ],
        config={},
    )
    publish(workspace, published)
    return published
