"""Check the sketch tier: does it rank as the teacher does, and what does an answer take?"""

from __future__ import annotations

import time

import pyarrow as pa
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.evaluation.ranking_metrics import agreement
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from tasks.artifact import Artifact, Made, once
from tasks.distilling.ranks import candidate_scores
from tasks.inputs.queries import Query, load_queries
from tasks.judging.metric_rows import agreement_rows, metric_row
from tasks.progress import stage
from tasks.teaching.run import Run
from tasks.teaching.sketch_scores import StoredSketches

SKETCH = "sketch"
SECONDS, BYTES = "seconds", "bytes a sample"  # of an answer; what is stored


@task(task_run_name="sketch check", cache_policy=NO_CACHE)
def check_sketches(run: Run, ranks: Artifact) -> Made:
    """Measure how far the sketch tier ranks as the teacher does, on the test queries.

    The gradient of a query is drawn anew, as for any image that is asked about. Labels and sketches share the noise of
    the samples.
    """
    context, cutoffs, sketches = run.context, run.config.evaluation.cutoffs, run.artifacts["sketches"]
    key = input_key("sketch check", ranks.key, sketches.key, cutoffs, table=tables.METRICS)
    path = context.workspace.teacher_check(key)

    def make(started: float) -> Manifest:
        test = [query for query in load_queries(run.artifacts["queries"]) if query.split == "test"]
        table = pa.Table.from_pylist(_rows(run, ranks, test), schema=tables.METRICS.schema)
        return commit_table(path, table, tables.METRICS, key=key, started=started, device=str(context.device))

    return once(Artifact("sketch check", key, path, 0), path, make)


def _rows(run: Run, ranks: Artifact, test: list[Query]) -> list[dict[str, object]]:
    names = [query.query_id for query in test]
    labels = candidate_scores(run.workspace, ranks, names)
    stored = StoredSketches(run.context, run.artifacts, run.name)
    measured, seconds = [], []
    with stage("sketch check", len(test)) as advance:
        for number, query in enumerate(test):
            known, started = labels.known[number], time.monotonic()
            mine = by_sketches(stored, query, labels.train_ids[number][known])
            seconds.append(time.monotonic() - started)
            measured.append(agreement(labels.scores[number][known][None], mine[None], run.config.evaluation.cutoffs))
            advance(1)
    # The first answer loads the model and the sketches.
    took = metric_row(SECONDS, SKETCH, torch.tensor(seconds[1:] or seconds, dtype=torch.float64))
    size = metric_row(BYTES, SKETCH, torch.tensor([stored.bytes_each], dtype=torch.float64))
    return [*agreement_rows(SKETCH, measured, names), took, size]


def by_sketches(stored: StoredSketches, query: Query, train_ids: Tensor) -> Tensor:
    """Return the scores of these samples by their sketches, (n,) float64; those without a sketch come last."""
    found = stored.scores(stored.ask(query.image, query.caption))
    scores = torch.full((stored.samples,), -torch.inf, dtype=torch.float64)
    scores[torch.from_numpy(found.train_ids)] = found.scores
    return scores[train_ids.long()]
