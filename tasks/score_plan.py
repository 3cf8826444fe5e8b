"""Split the pairs of a run into score shards, each the unit of work, retry and commit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgda_core.teachers.teachers import TEACHERS
from storage_schemas import tables
from storage_schemas.commit import committed, input_key
from storage_schemas.workspace import Workspace, part
from tasks.context import Context, Stage
from tasks.queries import load_queries


@dataclass(frozen=True)
class ScoreShard:
    """Some training samples against some queries."""

    number: int
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
        folder = workspace.scores(self.run)
        return [s for s in self.shards if committed(part(folder, s.number), self.shard_key(s)) is None]

    def stage(self, workspace: Workspace, *, reused: bool) -> Stage:
        """The finished scores as a stage."""
        folder = workspace.scores(self.run)
        manifests = [committed(part(folder, shard.number), self.shard_key(shard)) for shard in self.shards]
        seconds = sum(manifest.seconds for manifest in manifests if manifest)
        return Stage("teacher scores", self.run, folder, self.pairs, seconds, reused)


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
    for first in range(0, len(query_ids), shape[0]):
        block = list(range(len(query_ids)))[first : first + shape[0]]
        pool = np.flatnonzero(is_candidate[block].any(0))
        for start in range(0, len(pool), shape[1]):
            shards.append(ScoreShard(len(shards), block, pool[start : start + shape[1]].tolist()))
    return ScoreRun(candidates.key, query_ids, is_candidate, shards)
