"""The first ranks of the published queries, by training sample."""

from __future__ import annotations

import duckdb
import numpy as np
from numpy.typing import NDArray


def ranks_by_sample(
    connection: duckdb.DuckDBPyConnection, first: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.object_]]:
    """Return train_ids, ranks and query_ids of each query's first ranks, (rows,) each, by train_id and rank."""
    found = connection.execute(
        "SELECT train_id, rank, query_id FROM ranks WHERE rank <= ? ORDER BY train_id, rank, query_id",
        [first],
    ).fetchnumpy()
    return np.asarray(found["train_id"]), np.asarray(found["rank"]), np.asarray(found["query_id"])
