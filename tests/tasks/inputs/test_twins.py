"""Which training samples the twin test takes, and what it says."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest

from fastgda_core.diffusion.objective import Objective
from storage_schemas import tables
from storage_schemas.commit import commit_table, write_atomically
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.tables import PSEUDO, TWIN
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.inputs.samples import samples_artifact
from tasks.inputs.tars import scan
from tasks.inputs.twins import draw_twins
from tasks.watching.run_status import run_status
from tasks.watching.trust import (
    CAPTIONS,
    CONFIRMED_SHARE,
    LDS,
    OTHER_CURVATURE,
    OTHER_GRADIENT,
    OTHER_NOISE,
    OTHER_TEACHER,
    TEACHER,
    TWIN_RANK,
    by_itself,
    trust_in,
    trust_of,
)
from tests import tiny
from tests.storage_schemas.workspaces import finish_run, show

SAMPLES = 40


def samples_with(folder: Path, captions: list[str]) -> Artifact:
    """A table of samples whose images are drawn and whose captions are given."""
    members = []
    for number, caption in enumerate(captions):
        members += [(f"s{number:04d}.jpg", tiny.draw(number)[0]), (f"s{number:04d}.txt", caption.encode())]
    found, _ = scan([tiny.write_tar(folder / "shard.tar", members)], lambda: None)
    rows = [{"train_id": number, **asdict(sample)} for number, sample in enumerate(found)]
    table = pa.Table.from_pylist(rows, schema=tables.SAMPLES.schema)
    commit_table(folder / "samples.parquet", table, tables.SAMPLES, key="samples", started=0.0)
    return samples_artifact(folder / "samples.parquet")


def test_twins_are_spread_over_the_set_and_drawn_by_the_seed(tmp_path: Path) -> None:
    samples = samples_with(tmp_path, [f"number {number}" for number in range(SAMPLES)])
    twins = draw_twins(samples, 8, seed=0)
    assert [twin.train_id // 5 for twin in twins] == list(range(8))
    assert all(twin.caption == f"number {twin.train_id}" and not twin.shared for twin in twins)
    assert [twin.train_id for twin in twins] == [twin.train_id for twin in draw_twins(samples, 8, seed=0)]
    assert [twin.train_id for twin in twins] != [twin.train_id for twin in draw_twins(samples, 8, seed=1)]
    assert draw_twins(samples, 0, seed=0) == []


def test_captions_of_their_own_are_preferred_and_shared_ones_are_told(tmp_path: Path) -> None:
    alone = {3, 12, 27, 38}
    samples = samples_with(tmp_path, [f"own {n}" if n in alone else "a shape" for n in range(SAMPLES)])
    assert {twin.train_id for twin in draw_twins(samples, 4, seed=0)} == alone
    twins = draw_twins(samples, 8, seed=0)
    assert {twin.train_id for twin in twins if not twin.shared} <= alone
    assert {twin.caption for twin in twins if twin.shared} == {"a shape"}


def test_more_twins_than_samples_take_each_sample_once(tmp_path: Path) -> None:
    samples = samples_with(tmp_path, ["one", "two", "three"])
    assert sorted(twin.train_id for twin in draw_twins(samples, 8, seed=0)) == [0, 1, 2]


def test_a_sample_that_cannot_be_read_is_no_twin(tmp_path: Path) -> None:
    samples = samples_with(tmp_path, ["one", "two"])
    tar = tmp_path / "shard.tar"
    content = tar.read_bytes()
    place = content.index(tiny.draw(0)[0]) + 300
    tar.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
    assert [twin.train_id for twin in draw_twins(samples, 1, seed=0)] == [1]


def rank_row(kind: str, rank: int) -> dict[str, object]:
    return {
        "metric": TWIN_RANK,
        "space": TEACHER,
        "split": kind,
        "cutoff": 40,
        "query_id": f"{kind}-{rank}",
        "value": float(rank),
    }


@pytest.mark.parametrize(
    ("objective", "mend"),
    [
        (Objective.loss, "objective: output_norm"),
        (Objective.output_norm, "curvature.samples"),
        (None, "choose another candidates.space"),
    ],
)
def test_a_failed_test_names_the_line_to_change(objective: Objective | None, mend: str) -> None:
    ranks = [1] * 11 + [3652, 3689, 3897, 3918, 3953]
    trust = trust_of([rank_row(TWIN, rank) for rank in ranks] + [rank_row(PSEUDO, 1)] * 8, objective)
    (warning,) = trust.warnings
    assert "found 11 of 16 generated" in warning and "worst at rank 3,953" in warning and mend in warning
    assert "8 of 8 training images" in dict(trust.facts)["twins found"]


def judged_row(metric: str, space: str, value: float, queries: int, split: str) -> dict[str, object]:
    own = {"metric": metric, "space": space, "split": split, "cutoff": 0, "query_id": ""}
    return own | {"value": value, "standard_error": 0.04, "queries": queries}


@pytest.mark.parametrize(
    ("lds", "confirmed_found", "warned"), [(0.6, 1.0, False), (0.6, 2 / 3, True), (0.2, 1.0, True)]
)
def test_twins_that_retraining_does_not_confirm_are_no_fault_of_a_true_teacher(
    lds: float, confirmed_found: float, warned: bool
) -> None:
    ranks = [1] * 9 + [10, 182, 399]
    rows = [
        *(rank_row(TWIN, rank) for rank in ranks),
        judged_row(CONFIRMED_SHARE, TEACHER, confirmed_found, 3, TWIN),
        judged_row(LDS, TEACHER, lds, 16, "test"),
        judged_row(LDS, CAPTIONS, 0.3, 16, "test"),
    ]
    trust = trust_of(rows, Objective.loss, checkpoints=True)
    assert any("names wrong images" in warning for warning in trust.warnings) == warned
    assert f"and {3 * confirmed_found:.0f} of the 3 that retraining confirms" in dict(trust.facts)["twins found"]
    assert not any("output_norm" in warning for warning in trust.warnings)  # it has checkpoints already


def mean_row(metric: str, space: str, value: float, cutoff: int = 0) -> dict[str, object]:
    return {"metric": metric, "space": space, "split": "test", "cutoff": cutoff, "query_id": "", "value": value}


def test_a_teacher_that_finds_its_twins_is_not_warned_of() -> None:
    whole = mean_row("spearman", OTHER_TEACHER, 0.97)
    trust = trust_of([*[rank_row(TWIN, rank) for rank in (1, 1, 3)], whole], Objective.loss)
    assert not trust.warnings
    assert dict(trust.facts)["two teachers agree"] == "Spearman 0.970"
    assert trust_of([], Objective.loss).facts == []


@pytest.mark.parametrize(
    ("noise", "gradient", "curvature", "mend"),
    [
        (0.31, 0.9, 0.8, "teacher.timesteps or teacher.draws"),
        (0.9, 0.4, 0.8, "teacher.gradient_pairs"),
        (0.9, 0.8, 0.4, "curvature.samples or teacher.damping"),
    ],
)
def test_a_teacher_that_does_not_agree_with_itself_is_told_with_what_to_raise(
    noise: float, gradient: float, curvature: float, mend: str
) -> None:
    alone = {OTHER_NOISE: noise, OTHER_GRADIENT: gradient, OTHER_CURVATURE: curvature}
    rows = [mean_row("spearman", space, value) for space, value in {**alone, OTHER_TEACHER: 0.30}.items()]
    trust = trust_of(rows, Objective.output_norm)
    (warning,) = trust.warnings
    assert "Spearman 0.30" in warning and warning.endswith(f"raise {mend}")
    (of_pilot,) = replace(trust, plan="T=2, draws=2").warnings
    assert of_pilot.endswith("raise teacher.agreement" if "timesteps" in mend else f"raise {mend}")
    assert dict(replace(trust, plan="T=2, draws=2").facts)["noise plan"] == f"T=2, draws=2, measured {noise:.2f}"


@pytest.mark.parametrize(("head", "warned"), [(0.174, True), (0.130, False)])
def test_a_head_cannot_agree_with_its_teacher_better_than_another_such_teacher(head: float, warned: bool) -> None:
    rows = [mean_row("spearman", OTHER_TEACHER, 0.6)]
    rows += [mean_row("mAP", OTHER_TEACHER, value, cutoff) for cutoff, value in ((50, 0.1), (100, 0.2))]
    rows += [mean_row("mAP", "tuned", head, cutoff) for cutoff in (50, 100)]
    warnings = trust_of(rows, Objective.output_norm).warnings
    assert bool(warnings) == warned
    assert not warned or (f"mAP {head:.3f}" in warnings[0] and "(0.150)" in warnings[0])


def test_a_gradient_head_that_agrees_with_its_teacher_is_no_sign_of_noise() -> None:
    rows = [mean_row("mAP", OTHER_TEACHER, 0.95, 100), mean_row("mAP", "tuned", 0.96, 100)]
    assert trust_of(by_itself(rows, "symmetric"), Objective.output_norm).warnings
    assert not trust_of(by_itself(rows, "gradient"), Objective.output_norm).warnings


def test_the_status_of_a_run_warns_by_what_its_checks_and_its_head_have_found(tmp_path: Path) -> None:
    finish_run(tmp_path)
    workspace = Workspace(tmp_path)
    checks, metrics = tmp_path / "checks.parquet", workspace.metrics("m")
    for path, rows in (
        (checks, [mean_row("mAP", OTHER_TEACHER, 0.15, 100), mean_row("spearman", OTHER_TEACHER, 0.6)]),
        (metrics, [mean_row("mAP", "tuned", 0.17, 100), mean_row("mAP", OTHER_TEACHER, 0.9, 100)]),
    ):
        whole = [{**row, "standard_error": 0.0, "queries": 8} for row in rows]
        commit_table(path, pa.Table.from_pylist(whole, tables.METRICS.schema), tables.METRICS, key="m", started=0.0)
    write_atomically(workspace.checks("run-1"), json.dumps({"self-consistency": ["m", "checks.parquet", 2]}).encode())
    assert trust_in(workspace, "run-1").warnings == []
    publish_runs(workspace, ["run-1"])
    show(workspace, metrics=workspace.relative(metrics))
    (warning,) = run_status(workspace, "run-1").trust.warnings
    assert "mostly noise" in warning
