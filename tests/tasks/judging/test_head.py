"""What is measured of a head: against rankings whose agreement with the teacher is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from storage_schemas import tables
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_ranks
from tasks.distilling.labels import read_labels
from tasks.distilling.versions import load_trained_head
from tasks.inputs.features import load_features, load_query_features
from tasks.inputs.queries import joined_queries
from tasks.judging.head import measure_head
from tasks.judging.kept_checks import read_checks
from tests.tasks.whole_runs import CUTOFFS, WholeRun


def rows_of(run: WholeRun) -> list[dict]:
    return tables.read(run.evaluation.metrics.artifact.path, tables.METRICS).to_pylist()


def means(run: WholeRun) -> dict[tuple[str, str, int], float]:
    return {(row["metric"], row["space"], row["cutoff"]): row["value"] for row in rows_of(run) if not row["query_id"]}


def test_the_features_agree_fully_with_the_teacher_that_scores_by_them(similar: WholeRun) -> None:
    found = means(similar)
    for cutoff in CUTOFFS:
        assert found["mAP", "untuned", cutoff] == pytest.approx(1.0)
    assert found["spearman", "untuned", 0] == pytest.approx(1.0)
    assert 0 < found["mAP", "chance", CUTOFFS[0]] < 1
    assert similar.evaluation.untuned == pytest.approx(1.0)
    assert similar.evaluation.tuned == found["mAP", "tuned", CUTOFFS[-1]]


def test_a_head_is_measured_on_the_test_queries_as_scikit_learn_would(similar: WholeRun) -> None:
    labels, context = read_labels(similar.workspace, None), similar.context
    head = load_trained_head(similar.head.artifact.path)
    queries = joined_queries(labels.queries)
    vectors = head.queries(load_query_features(context, labels.queries, labels.samples)).detach().numpy()
    samples = head(load_features(context, labels.samples, labels.samples)).detach().numpy()
    precisions, correlations = [], []
    for row, query in enumerate(queries):
        if query.split != "test":
            continue
        ranked = read_ranks(similar.workspace, labels.ranks.key, [query.query_id]).sort_by("rank").to_pydict()
        mine = samples[ranked["train_id"]] @ vectors[row]
        relevant = np.arange(len(mine)) < CUTOFFS[0]
        precisions.append(average_precision_score(relevant, mine))
        correlations.append(spearmanr(mine, ranked["score"]).statistic)
    assert len(precisions) == 2
    assert means(similar)["mAP", "tuned", CUTOFFS[0]] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert means(similar)["spearman", "tuned", 0] == pytest.approx(np.mean(correlations), abs=1e-6)


def test_what_the_checks_found_stands_beside_it_and_is_measured_once(unlearned: WholeRun) -> None:
    found = means(unlearned)
    assert ("spearman", "exact vs first order", 0) in found and ("relative error", "low-rank Delta theta", 0) in found
    labels, context = read_labels(unlearned.workspace, None), unlearned.context
    checks = read_checks(unlearned.workspace, unlearned.run.name)
    names = ["twin test", "low-rank error", "exact check", "self-consistency", "sketch check"]
    names += ["retraining check", "costs", "planted truth"]
    assert [check.name for check in checks] == names
    again = measure_head.fn(context, labels.samples, labels.queries, labels.ranks, unlearned.head.artifact, checks)
    assert again.reused and again.artifact == unlearned.evaluation.metrics.artifact
    without = measure_head.fn(context, labels.samples, labels.queries, labels.ranks, unlearned.head.artifact, [])
    assert without.artifact.key != again.artifact.key and without.artifact.rows < again.artifact.rows


def test_what_is_measured_is_served(similar: WholeRun) -> None:
    published = read_published(similar.workspace)
    assert not similar.evaluation.refused
    assert published.index == similar.workspace.relative(similar.index.artifact.path)
    assert published.metrics == similar.workspace.relative(similar.evaluation.metrics.artifact.path)
