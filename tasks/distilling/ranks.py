"""Read what the rank head learns from: scores, rank labels, features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.evaluation.candidates import CandidateScores
from fastgda_core.ranking.batches import RankPairs, first_pairs
from storage_schemas.snapshots.snapshots import read_influence, read_snapshot
from storage_schemas.tombstones import without
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.inputs.features import load_features, map_features
from tasks.inputs.queries import joined_queries


def run_behind(workspace: Workspace, ranks: Artifact) -> str:
    """Return the run that a snapshot's rows are of; the last, where it holds several."""
    return read_snapshot(workspace, ranks.key).runs[-1]


ROWS_AT_ONCE = 300_000


def candidate_scores(
    workspace: Workspace, ranks: Artifact, query_ids: Sequence[str], removed: Sequence[int] = ()
) -> CandidateScores:
    """Read the teacher's scores of some queries' candidates; negative ones are 0 where the labels tie them.

    `removed` are train_ids that are left out.
    """
    table = without(read_influence(workspace, ranks.key, list(query_ids)), removed)
    number = pc.index_in(table["query_id"], pa.array(query_ids, pa.string())).to_numpy()
    columns = (number, table["train_id"].to_numpy(), table["score"].to_numpy())
    return CandidateScores.of(*(torch.from_numpy(each.copy()) for each in columns), queries=len(query_ids))


def sample_features(context: Context, samples: Artifact) -> Tensor:
    """Load phi of all samples, (samples, d): in memory, or mapped from a file where `head.resident` is false."""
    return load_features(context, samples, samples) if context.config.head.resident else map_features(context, samples)


def rank_pairs(
    workspace: Workspace, ranks: Artifact, query_ids: Sequence[str], rows: Tensor, samples: int, *, standardised: bool
) -> RankPairs:
    """Read the labelled pairs of some queries, a few queries at a time: a hundred million take 0.8 GB.

    Args:
        workspace: where the rank labels are.
        ranks: their snapshot.
        query_ids: of all queries.
        rows: numbers of the wanted ones, ascending.
        samples: how many training samples there are.
        standardised: labels are scores, of mean 0 and deviation 1 within their query, instead of rank labels. Negative
            scores are 0 before that where the labels tie them, and non-candidates have the least label of their query.
    """
    sample, label = np.empty(ranks.rows, np.int32), np.empty(ranks.rows, np.float32)
    count = torch.zeros(len(query_ids), dtype=torch.int64)
    outside = torch.ones(len(query_ids))
    at_once = max(1, ROWS_AT_ONCE * len(query_ids) // max(1, ranks.rows))
    filled = 0
    for few in torch.split(rows, at_once):
        names = [query_ids[row] for row in few.tolist()]
        table = read_influence(workspace, ranks.key, names)
        number = pc.index_in(table["query_id"], pa.array(names)).to_numpy()
        if standardised:
            values, least = _standardised(table["score"].to_numpy(), number, len(few))
            outside[few] = torch.from_numpy(least).float()
        else:
            values = table["rank_label"].to_numpy()
        train_id = table["train_id"].to_numpy()
        order = np.argsort(number * samples + train_id)
        count[few] = torch.from_numpy(np.bincount(number, minlength=len(few)))
        stretch = slice(filled, filled + len(order))
        sample[stretch], label[stretch] = train_id[order], values[order]
        filled = stretch.stop
    found = torch.from_numpy(sample[:filled]), torch.from_numpy(label[:filled])
    return RankPairs(first_pairs(count), *found, outside, samples)


def _standardised(score: NDArray[np.float64], query: NDArray[np.int64], queries: int) -> tuple[Any, Any]:
    """Return scores of mean 0 and deviation 1 within their query, (n,), and the least of each query, (queries,)."""
    count = np.maximum(np.bincount(query, minlength=queries), 1)
    centred = score - (np.bincount(query, score, queries) / count)[query]
    deviation = np.sqrt(np.bincount(query, centred**2, queries) / count)
    values = centred / np.where(deviation > 0, deviation, 1.0)[query]
    least = np.zeros(queries)
    np.minimum.at(least, query, values)
    return values, least


def rows_of_split(queries: Sequence[Artifact], split: str) -> Tensor:
    """Return the numbers of a split's queries among the queries of all sets, (n,), ascending."""
    return torch.tensor([row for row, query in enumerate(joined_queries(queries)) if query.split == split])
