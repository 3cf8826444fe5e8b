"""What candidates leave out, on a tiny run: compared with a run of the same teacher that scored everything."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flows.curation import curate
from storage_schemas import tables
from storage_schemas.snapshots.snapshots import read_ranks
from tasks.config.inputs import CandidateCheckConfig, CandidatesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.inputs.queries import load_queries
from tasks.judging.candidates import check_candidates
from tasks.judging.kept_checks import publish_checks
from tasks.watching.trust import CANDIDATE_RECALL, Trust, trust_in
from tests.tasks.whole_runs import CUTOFFS, WholeRun
from tests.tasks.without_prefect import without_prefect

K = 9


def with_candidates(run: WholeRun, folder: Path, **check: int) -> PipelineConfig:
    """The configuration with the nearest alone as candidates, in a copy of the workspace, whose parts it shares."""
    shutil.copytree(str(run.workspace.root), folder / "workspace", copy_function=os.link)
    candidates = CandidatesConfig(policy="top_k", k=K, check=CandidateCheckConfig(**check))
    alone = {"candidates": candidates, "judge": None, "exact_check": None, "self_consistency": None, "publish": "never"}
    alone["workspace"] = str(folder / "workspace")
    return run.config.model_copy(update=alone)


def measured(config: PipelineConfig) -> tuple[dict[tuple[str, int], dict], Trust]:
    with without_prefect():
        curation = curate(config)
        made = check_candidates(curation.run, curation.ranks)
        assert check_candidates(curation.run, curation.ranks).reused
        publish_checks(curation.run, [made.artifact])
    rows = tables.read(made.artifact.path, tables.METRICS).to_pylist()
    assert {row["metric"] for row in rows} == {CANDIDATE_RECALL}
    trust = trust_in(curation.run.workspace, curation.run.name)
    return {(row["query_id"], row["cutoff"]): row for row in rows}, trust


@pytest.mark.heavy
def test_the_share_is_that_of_a_run_that_scored_everything(unlearned: WholeRun, tmp_path: Path) -> None:
    rows, trust = measured(with_candidates(unlearned, tmp_path, queries=2))
    tested = [query.query_id for query in load_queries(unlearned.run.artifacts["queries"]) if query.split == "test"]
    scored = read_ranks(unlearned.workspace, unlearned.curation.ranks.key, tested).to_pylist()
    near = tables.read(unlearned.run.artifacts["candidates"].path, tables.CANDIDATES).to_pylist()
    for cutoff in CUTOFFS:
        shares = []
        for name in tested:
            mine = sorted((row for row in scored if row["query_id"] == name), key=lambda row: -row["score"])
            nearest = {r["train_id"] for r in near if r["query_id"] == name and r["neighbor_rank"] <= K}
            shares.append(sum(row["train_id"] in nearest for row in mine[:cutoff]) / cutoff)
            assert rows[name, cutoff]["value"] == pytest.approx(shares[-1])
        assert rows["", cutoff]["value"] == pytest.approx(sum(shares) / len(shares))
    means = {cutoff: rows["", cutoff]["value"] for cutoff in CUTOFFS}
    assert {cutoff: value for cutoff, (value, _) in trust.candidates.items()} == pytest.approx(means)
    low = any(value < 0.9 for value in means.values())
    assert low == any("candidates leave out what the teacher ranks first" in each for each in trust.warnings)
    assert dict(trust.facts)["candidate recall"]


@pytest.mark.heavy
def test_a_random_share_of_the_others_gives_an_estimate_with_its_error(unlearned: WholeRun, tmp_path: Path) -> None:
    rows, trust = measured(with_candidates(unlearned, tmp_path, queries=2, random=12))
    assert {name for name, _ in rows} == {""}
    for cutoff in CUTOFFS:
        row = rows["", cutoff]
        assert 0 <= row["value"] <= 1 and row["queries"] == 2
        assert row["standard_error"] >= 1 / 2 / cutoff, "one hit more of twelve that stand for all others"
    assert trust.warnings


def test_what_is_low_and_what_cannot_be_told_is_warned_of_and_what_is_well_is_not() -> None:
    def of(**figures: tuple[float, float]) -> list[str]:
        candidates = {int(name[1:]): figure for name, figure in figures.items()}
        return Trust({}, None, None, candidates=candidates).warnings

    assert of(l10=(0.95, 0.01), l100=(0.9, 0.05)) == []
    (low,) = of(l10=(0.95, 0.01), l100=(0.5, 0.2))
    assert "the nearest hold 0.50 ± 0.20 of its first 100; raise candidates.k" in low
    (wide,) = of(l1000=(1.0, 0.4))
    assert "cannot be told: 1.00 ± 0.40 of its first 1,000; raise candidates.check.random" in wide
