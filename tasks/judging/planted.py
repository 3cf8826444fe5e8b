"""Planted truth: samples that stand under a query's very caption are to be the first that a method names for it.

It needs no retraining. Best is a caption of invented words at pictures that were made up, as in the judge's world: what
the model draws of those it can have learned from them alone. Where the caption is that of an ordinary sample, this is
the twin test for every method.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.evaluation.ranking_metrics import r_precision
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from tasks.artifact import Artifact, Made, once
from tasks.inputs.features import features_key
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import samples_table
from tasks.judging.ensembles import ensemble_scores, members
from tasks.judging.methods import method_scores, teacher_scores
from tasks.judging.metric_rows import metric_row, metric_rows
from tasks.judging.rivals import Rivals
from tasks.teaching.retrainings import RetrainingParts
from tasks.teaching.run import Run
from tasks.watching.trust import TEACHER

R_PRECISION = "R-precision"
SPLITS = ("validation", "test")


def planted_samples(run: Run) -> dict[int, list[int]]:
    """Return the samples that stand under a query's caption word for word, by the query's number, where there are any.

    Queries of the twin test do not count.
    """
    asked = {
        number: query.caption
        for number, query in enumerate(load_queries(run.artifacts["queries"]))
        if query.split in SPLITS
    }
    captions = samples_table(run.artifacts["samples"].path)["captions"].combine_chunks()
    wanted = pa.array(sorted(set(asked.values())), pa.string())
    words, owners = pc.list_flatten(captions), pc.list_parent_indices(captions)
    known = pc.is_in(words, wanted)
    under: dict[str, set[int]] = {}
    for caption, train_id in zip(words.filter(known).to_pylist(), owners.filter(known).to_pylist(), strict=True):
        under.setdefault(caption, set()).add(train_id)
    return {number: sorted(under[caption]) for number, caption in asked.items() if caption in under}


@task(task_run_name="planted truth", cache_policy=NO_CACHE)
def check_planted(run: Run, ranks: Artifact, planted: dict[int, list[int]]) -> Made:
    """Measure how many of a query's n planted samples are among the first n of its teacher.

    Where the run has a judge, whose pool is complete by now, all methods but tiers are asked, too.

    Args:
        run: a scored one.
        ranks: its rank labels.
        planted: as `planted_samples` returns them, at least one query.
    """
    judge, samples, queries = run.config.judge, run.artifacts["samples"], run.artifacts["queries"]
    beside: list[object] | None = None
    if judge:
        pool = run.artifacts[RetrainingParts.kind]
        features, near = features_key(run.context, samples), run.config.candidates.space
        beside = [judge.seed, judge.subsets, judge.share, features, near, pool.key, Rivals.of(run).key]
    key = input_key("planted truth 2", ranks.key, samples.key, queries.key, beside, table=tables.METRICS)
    path = run.workspace.teacher_check(key)

    def make(started: float) -> Manifest:
        table = pa.Table.from_pylist(_rows(run, ranks, planted), schema=tables.METRICS.schema)
        return commit_table(path, table, tables.METRICS, key=key, started=started)

    return once(Artifact("planted truth", key, path, 0), path, make)


def _rows(run: Run, ranks: Artifact, planted: dict[int, list[int]]) -> list[dict[str, object]]:
    queries, chosen = load_queries(run.artifacts["queries"]), list(planted)
    relevant = torch.zeros(len(chosen), run.artifacts["samples"].rows, dtype=torch.bool)
    for row, number in enumerate(chosen):
        relevant[row, planted[number]] = True
    methods = _beside_teacher(run, ranks, chosen) if run.config.judge else {}
    # What is no candidate comes last: a sample below 0 was at least asked for.
    ids = [queries[number].query_id for number in chosen]
    methods |= {TEACHER: teacher_scores(run, ranks, ids, left_out=-torch.inf)}
    rows: list[dict[str, object]] = []
    for split in SPLITS:
        mine = [row for row, number in enumerate(chosen) if queries[number].split == split]
        names = [queries[chosen[row]].query_id for row in mine]
        for method, scores in methods.items() if mine else ():
            values = r_precision(scores[mine], relevant[mine])
            rows.append(metric_row(R_PRECISION, method, values, split=split))
            rows += [row | {"split": split} for row in metric_rows(R_PRECISION, method, values, names)][1:]
    return rows


def _beside_teacher(run: Run, ranks: Artifact, chosen: list[int]) -> dict[str, Tensor]:
    """Return what the methods beside the teacher say of some queries, rivals and ensembles among them."""
    beside = members(run, ranks) | Rivals.of(run).scores(left_out=-torch.inf) | ensemble_scores(run, ranks)
    return method_scores(run, ranks, chosen) | {name: each[chosen] for name, each in beside.items()}
