"""The queries that each training sample influenced: those in whose first ranks it is, by the teacher."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage_schemas.sql.first_ranks import ranks_by_sample
from storage_schemas.sql.views import connect
from storage_schemas.workspace import Workspace
from tasks.inputs.queries import Query

FIRST = 100  # ranks of a query that are looked at


@dataclass(frozen=True)
class FirstRanks:
    """The first ranks of all published queries, (rows,) each, by train_id and then by rank."""

    train_ids: NDArray[np.int64]
    ranks: NDArray[np.int32]
    query_ids: NDArray[np.object_]

    def of(self, train_id: int, queries: Mapping[str, Query]) -> list[dict[str, Any]]:
        """Return the queries in whose first ranks a sample is, best rank first."""
        first, last = np.searchsorted(self.train_ids, [train_id, train_id + 1])
        rows = zip(self.query_ids[first:last].tolist(), self.ranks[first:last].tolist(), strict=True)
        return [
            {"query_id": query_id, "split": queries[query_id].split, "caption": queries[query_id].caption, "rank": rank}
            for query_id, rank in rows
            if query_id in queries
        ]


@functools.lru_cache(maxsize=2)
def first_ranks(workspace: Workspace, snapshot: str) -> FirstRanks:
    """Read the first ranks of what is published; they may be kept, as a snapshot is never changed."""
    with connect(workspace.root, threads=1) as connection:
        return FirstRanks(*ranks_by_sample(connection, FIRST))
