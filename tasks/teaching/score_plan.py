"""Split the pairs of a run into score shards, each the unit of work, retry and commit."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage_schemas import tables
from storage_schemas.commit import code_version, input_key
from storage_schemas.runs.ledger import write_plan
from storage_schemas.runs.records import RunRecord
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.inputs.queries import load_queries


@dataclass(frozen=True, eq=False)
class ScoreShard:
    """The pairs of some training samples and some queries."""

    number: int
    query_block: int
    query_numbers: list[int]
    train_ids: NDArray[np.int64]  # ascending


@dataclass(frozen=True, eq=False)
class ScoreRun:
    """The pairs of a run: its queries, their candidates, and the shards.

    candidates: of each query, ascending.
    """

    run: str
    query_ids: list[str]
    candidates: list[NDArray[np.int64]]
    shards: list[ScoreShard]

    @property
    def pairs(self) -> int:
        return sum(len(mine) for mine in self.candidates)

    def pairs_of(self, shard: ScoreShard) -> int:
        return sum(int(self.chosen(number, shard.train_ids).sum()) for number in shard.query_numbers)

    def chosen(self, number: int, train_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mark those of these samples, ascending, that the query is scored against, (n,) bool."""
        mine = self.candidates[number]
        place = np.searchsorted(mine, train_ids)
        return np.append(mine, -1)[place] == train_ids

    def pool(self, numbers: list[int]) -> NDArray[np.int64]:
        """Return the samples that any of these queries is scored against, ascending."""
        return np.unique(np.concatenate([self.candidates[number] for number in numbers]))

    def shard_key(self, shard: ScoreShard) -> str:
        return input_key(self.run, shard.query_numbers, shard.train_ids.tolist(), table=tables.SCORES)


def plan_scores(candidates: Artifact, queries: Artifact, shape: tuple[int, int | None]) -> ScoreRun:
    """Plan the shards of a run.

    Args:
        shape: queries and training samples of one shard; None: all that the queries are scored against.
    """
    query_ids = [query.query_id for query in load_queries(queries)]
    chosen = _candidates(candidates, query_ids)
    run = ScoreRun(candidates.key, query_ids, chosen, [])
    for number, first in enumerate(range(0, len(query_ids), shape[0])):
        block = list(range(first, min(first + shape[0], len(query_ids))))
        pool = run.pool(block)
        step = shape[1] or max(1, len(pool))
        for start in range(0, len(pool), step):
            run.shards.append(ScoreShard(len(run.shards), number, block, pool[start : start + step]))
    return run


def _candidates(candidates: Artifact, query_ids: list[str]) -> list[NDArray[np.int64]]:
    """Return the training samples of each query, ascending; of a hundred million pairs 0.8 GB is held, and no more.

    A query's rows lie together in the file.
    """
    names, found = pa.array(query_ids), [[np.empty(0, np.int64)] for _ in query_ids]
    for rows in tables.read_in_blocks(candidates.path, tables.CANDIDATES, ["query_id", "train_id"]):
        numbers, train_ids = pc.index_in(rows["query_id"], names).to_numpy(), rows["train_id"].to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            found[numbers[start]].append(train_ids[start:stop].copy())
    return [np.sort(np.concatenate(several)) for several in found]


def store_plan(context: Context, score_run: ScoreRun, stages: dict[str, Artifact], origin: str) -> None:
    """Write down what the run will do, so that its ledger can always be rebuilt."""
    workspace = context.workspace
    block_of = {number: shard.query_block for shard in score_run.shards for number in shard.query_numbers}
    planned = [
        (name, block_of[number], len(score_run.candidates[number]))
        for number, name in enumerate(score_run.query_ids)
        if number in block_of
    ]
    names, blocks, counts = zip(*planned, strict=True)
    samples, base_losses = stages["samples"], stages.get("base losses")
    record = RunRecord(
        run=score_run.run,
        name=context.config.name,
        teacher=context.config.teacher.name,
        created_at=datetime.now(UTC),
        code_version=code_version(),
        shards=len(score_run.shards),
        pairs=score_run.pairs,
        samples=workspace.relative(samples.path),
        rejected_samples=workspace.relative(samples.path.with_name("rejected.parquet")),
        queries=workspace.relative(stages["queries"].path),
        candidates=workspace.relative(stages["candidates"].path),
        base_losses=workspace.relative(base_losses.path) if base_losses else None,
        origin=origin,
        config=context.config.model_dump(mode="json"),
    )
    shards = tables.PLAN_SHARDS.rows(
        shard=[shard.number for shard in score_run.shards],
        input_key=[score_run.shard_key(shard) for shard in score_run.shards],
        query_block=[shard.query_block for shard in score_run.shards],
        pairs=[score_run.pairs_of(shard) for shard in score_run.shards],
    )
    write_plan(workspace, record, shards, tables.PLAN_QUERIES.rows(query_id=names, query_block=blocks, pairs=counts))
