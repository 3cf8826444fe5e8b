"""Samples that stand under a query's own caption, and how many of them methods name first."""

from __future__ import annotations

import pytest

from fastgda_core.evaluation.ensembles import BEST
from storage_schemas import tables
from storage_schemas.snapshots.snapshots import read_influence
from storage_schemas.sql.views import query
from tasks.inputs.queries import load_queries
from tasks.judging.kept_checks import read_checks
from tasks.judging.methods import RANDOM, UNTUNED
from tasks.judging.planted import R_PRECISION, SPLITS, check_planted, planted_samples
from tasks.watching.trust import TEACHER
from tests.tasks.whole_runs import WholeRun


def check_rows(run: WholeRun) -> dict[tuple[str, str, str], dict]:
    (check,) = (each for each in read_checks(run.workspace, run.run.name) if each.name == "planted truth")
    rows = tables.read(check.path, tables.METRICS).to_pylist()
    assert {row["metric"] for row in rows} == {R_PRECISION}
    return {(row["space"], row["split"], row["query_id"]): row for row in rows}


def test_queries_whose_caption_a_sample_has_are_found(unlearned: WholeRun) -> None:
    """The queries are samples 0 to 7, of which no other has the caption."""
    queries = load_queries(unlearned.run.artifacts["queries"])
    found = planted_samples(unlearned.run)
    assert found == {
        number: [int(query.caption.split()[-1])] for number, query in enumerate(queries) if query.split in SPLITS
    }
    assert len(found) == 4


@pytest.mark.parametrize("kind", ["unlearned", "similar"])
def test_the_share_of_planted_samples_that_a_method_names_first(kind: str, request: pytest.FixtureRequest) -> None:
    run: WholeRun = request.getfixturevalue(kind)
    rows, queries = check_rows(run), load_queries(run.run.artifacts["queries"])
    sums = {space for space, _, _ in rows if space.startswith(BEST)}
    beside = {UNTUNED, RANDOM, "pixel"} if run.config.judge else set()
    assert {space for space, _, _ in rows} == {TEACHER} | beside | sums and len(sums) == (2 if run.config.judge else 0)
    scored = read_influence(run.workspace, run.curation.ranks.key, [each.query_id for each in queries]).to_pylist()
    for split in SPLITS:
        hits = []
        for asked in (each for each in queries if each.split == split):
            mine = [row for row in scored if row["query_id"] == asked.query_id]
            best = max(mine, key=lambda row: (row["score"], -row["train_id"]))["train_id"]
            hits.append(float(best == int(asked.caption.split()[-1])))
            assert rows[TEACHER, split, asked.query_id]["value"] == hits[-1]
        assert rows[TEACHER, split, ""]["value"] == sum(hits) / len(hits)
        assert rows[TEACHER, split, ""]["queries"] == len(hits)
        if run.config.judge:
            assert rows[UNTUNED, split, ""]["value"] == 1, "the query is the sample, pixel for pixel"
    assert check_planted.fn(run.run, run.curation.ranks, planted_samples(run.run)).reused


def test_it_is_in_sql(similar: WholeRun) -> None:
    found = query(similar.workspace.root, f"SELECT DISTINCT split FROM metrics WHERE metric = '{R_PRECISION}'")
    assert sorted(row["split"] for row in found.to_pylist()) == sorted(SPLITS)
