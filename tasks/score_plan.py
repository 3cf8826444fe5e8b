"""Split the pairs of a run into score shards, each the unit of work, retry and commit."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from fastgda_core.teachers.teachers import TEACHERS
from storage_schemas import tables
from storage_schemas.commit import code_version, input_key
from storage_schemas.ledger import RunRecord, done_shards, read_ledger, write_plan
from storage_schemas.workspace import Workspace
from tasks.context import Context, Stage
from tasks.queries import load_queries


@dataclass(frozen=True)
class ScoreShard:
    """Some training samples against some queries."""

    number: int
    query_block: int
    query_numbers: list[int]
    train_ids: list[int]

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


@dataclass(frozen=True, eq=False)
class ScoreRun:
    """One execution's pairs: which queries, which candidates, in which shards."""

    run: str
    query_ids: list[str]
    is_candidate: NDArray[np.bool_]  # (queries, samples)
    shards: list[ScoreShard]

    @property
    def pairs(self) -> int:
        return int(self.is_candidate.sum())

    def pairs_of(self, shard: ScoreShard) -> int:
        return int(self.is_candidate[np.ix_(shard.query_numbers, shard.train_ids)].sum())

    def shard_key(self, shard: ScoreShard) -> str:
        return input_key(self.run, shard.query_numbers, shard.train_ids)

    def missing(self, workspace: Workspace) -> list[ScoreShard]:
        """The shards that are not committed yet."""
        done = done_shards(workspace, self.run)
        return [shard for shard in self.shards if shard.number not in done]

    def stage(self, workspace: Workspace, *, reused: bool) -> Stage:
        """The finished scores as a stage."""
        seconds = sum(read_ledger(workspace, self.run)["seconds"].to_pylist())
        return Stage("teacher scores", self.run, workspace.scores(self.run), self.pairs, seconds, reused)


def plan_scores(context: Context, candidates: Stage, samples: Stage, queries: Stage) -> ScoreRun:
    """Exact teacher: one query and its candidates a shard. First order: a block of queries and a block of samples."""
    query_ids = [query.query_id for query in load_queries(queries)]
    table = tables.read(candidates.path, tables.CANDIDATES)
    row_of = {query_id: row for row, query_id in enumerate(query_ids)}
    rows = [row_of[query_id] for query_id in table["query_id"].to_pylist()]
    is_candidate = np.zeros((len(query_ids), samples.rows), dtype=bool)
    is_candidate[rows, table["train_id"].to_numpy()] = True
    config = context.config.teacher
    if TEACHERS[config.name].first_order:
        shape = config.shard_queries or len(query_ids), config.shard_samples
    else:
        shape = 1, samples.rows
    shards: list[ScoreShard] = []
    for number, first in enumerate(range(0, len(query_ids), shape[0])):
        block = list(range(len(query_ids)))[first : first + shape[0]]
        pool = np.flatnonzero(is_candidate[block].any(0))
        for start in range(0, len(pool), shape[1]):
            shards.append(ScoreShard(len(shards), number, block, pool[start : start + shape[1]].tolist()))
    return ScoreRun(candidates.key, query_ids, is_candidate, shards)


def store_plan(
    context: Context, score_run: ScoreRun, samples: Stage, queries: Stage, candidates: Stage, base_losses: Stage | None
) -> None:
    """Write down what the run will do, so that its ledger can always be rebuilt."""
    workspace = context.workspace
    block_of = {number: shard.query_block for shard in score_run.shards for number in shard.query_numbers}
    pairs = score_run.is_candidate.sum(axis=1)
    planned = [(name, block_of[n], pairs[n]) for n, name in enumerate(score_run.query_ids) if n in block_of]
    names, blocks, counts = zip(*planned, strict=True)
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
        queries=workspace.relative(queries.path),
        candidates=workspace.relative(candidates.path),
        base_losses=workspace.relative(base_losses.path) if base_losses else None,
        config=context.config.model_dump(mode="json"),
    )
    shards = tables.PLAN_SHARDS.rows(
        shard=[shard.number for shard in score_run.shards],
        input_key=[score_run.shard_key(shard) for shard in score_run.shards],
        query_block=[shard.query_block for shard in score_run.shards],
        pairs=[score_run.pairs_of(shard) for shard in score_run.shards],
    )
    write_plan(workspace, record, shards, tables.PLAN_QUERIES.rows(query_id=names, query_block=blocks, pairs=counts))
