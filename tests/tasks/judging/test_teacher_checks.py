"""The checks of a teacher on a tiny model, and what is told of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from storage_schemas import tables
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_ranks
from tasks.context import load_tensors
from tasks.inputs.queries import load_queries
from tasks.inputs.twins import load_twins
from tasks.judging.kept_checks import read_checks
from tasks.judging.teacher import check_against_exact, check_precision, check_self_consistency, check_twins
from tasks.watching.trust import OTHER_CURVATURE, OTHER_GRADIENT, OTHER_NOISE, OTHER_TEACHER, trust_in
from tests.tasks.whole_runs import CUTOFFS, TWINS, WholeRun


def rows_of(run: WholeRun, name: str) -> list[dict]:
    (check,) = (each for each in read_checks(run.workspace, run.run.name) if each.name == name)
    return tables.read(check.path, tables.METRICS).to_pylist()


@pytest.mark.heavy
def test_the_exact_teacher_is_asked_over_the_whole_ranking(unlearned: WholeRun) -> None:
    run = unlearned.run
    (made,) = (each for each in unlearned.checks if each.artifact.name == "exact check")
    pairs = tables.read_parts(made.artifact.path, tables.SCORES).to_pylist()
    assert made.artifact.rows == len(pairs) == 2 * 6
    tested = [query.query_id for query in load_queries(run.artifacts["queries"]) if query.split == "test"]
    assert {pair["query_id"] for pair in pairs} == set(tested)
    ranked = read_ranks(unlearned.workspace, unlearned.curation.ranks.key, tested).to_pylist()
    first_order = {(row["query_id"], row["train_id"]): row for row in ranked}
    for query_id in tested:
        mine = [pair for pair in pairs if pair["query_id"] == query_id]
        places = sorted(first_order[query_id, pair["train_id"]]["rank"] for pair in mine)
        assert places[0] == 1 and places[-1] == 24 and max(np.diff(places)) <= 6
        both = [(pair["score"], first_order[query_id, pair["train_id"]]["score"]) for pair in mine]
        assert spearmanr(*zip(*both, strict=True)).statistic > 0.8, "of a small step the linear part is most"
    assert read_published(unlearned.workspace).exact_check == unlearned.workspace.relative(made.artifact.path)
    again = check_against_exact.fn(run, unlearned.curation.ranks)
    assert again.reused and again.artifact == made.artifact


def test_a_teacher_is_compared_with_itself_part_by_part(unlearned: WholeRun) -> None:
    rows = rows_of(unlearned, "self-consistency")
    means = {(row["metric"], row["space"], row["cutoff"]): row for row in rows if not row["query_id"]}
    for space in (OTHER_NOISE, OTHER_GRADIENT, OTHER_CURVATURE, OTHER_TEACHER):
        assert -1 <= means["spearman", space, 0]["value"] < 1, "it is another draw"
        assert means["spearman", space, 0]["queries"] == 2
        assert {cutoff for metric, each, cutoff in means if (metric, each) == ("mAP", space)} == set(CUTOFFS)
    trust = trust_in(unlearned.workspace, unlearned.run.name)
    assert trust.agreement == pytest.approx(means["spearman", OTHER_TEACHER, 0]["value"])
    assert trust.parts[OTHER_NOISE] == pytest.approx(means["spearman", OTHER_NOISE, 0]["value"])
    assert check_self_consistency.fn(unlearned.run, unlearned.curation.ranks).reused


def test_what_a_low_rank_loses_is_measured_for_every_query(unlearned: WholeRun) -> None:
    (row,) = rows_of(unlearned, "low-rank error")
    updates = unlearned.run.parts["unlearning steps"]
    errors = [load_tensors(updates.path(number))["/relative_error"].item() for number in range(updates.count)]
    assert row["queries"] == updates.count == 8 + 2 * TWINS
    assert row["value"] == pytest.approx(np.mean(errors)) and all(0 < error < 1 for error in errors)


def test_the_twin_test_says_where_each_twin_stands(unlearned: WholeRun, similar: WholeRun) -> None:
    for run in (unlearned, similar):
        queries = run.run.artifacts["queries"]
        ranked = read_ranks(run.workspace, run.curation.ranks.key, None).to_pylist()
        place = {(row["query_id"], row["train_id"]): row["rank"] for row in ranked}
        twins = load_twins(queries.path)
        rows = {row["query_id"]: row for row in rows_of(run, "twin test") if row["query_id"]}
        assert rows.keys() == twins.keys() and len(twins) == 2 * TWINS
        for query_id, twin in twins.items():
            assert rows[query_id]["value"] == place[query_id, twin]
    pseudo = [row["value"] for row in rows.values() if row["split"] == "pseudo"]
    assert pseudo == [1.0] * TWINS, "a picture is nearest to itself"
    assert check_twins.fn(similar.run, similar.curation.ranks).reused


def test_a_precision_is_compared_with_float64(unlearned: WholeRun) -> None:
    made = check_precision.fn(unlearned.run).artifact
    rows = tables.read(made.path, tables.METRICS).to_pylist()
    assert {row["space"] for row in rows} == {"float32 vs float64"}
    assert all(row["value"] >= 0.999 for row in rows) and rows[0]["queries"] == 8 + 2 * TWINS


def test_the_steps_of_the_run_are_those_of_its_queries(unlearned: WholeRun) -> None:
    parts = unlearned.run.parts
    before = ["latents", "curvature", "unlearning steps", "sketch basis"]
    assert list(parts) == [*before, "scores", "sketches", "retrainings", "removals"]
    assert all(each.missing() == [] and each.standing().seconds > 0 for each in parts.values())
    one, other = (load_tensors(parts["unlearning steps"].path(number)) for number in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)
