"""Which training samples the twin test takes, and what it says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest

from fastgda_core.diffusion.objective import Objective
from storage_schemas import tables
from storage_schemas.commit import commit_table
from tasks.context import Stage
from tasks.samples import samples_stage
from tasks.trust import OTHER_TEACHER, PSEUDO, TEACHER, TWIN, TWIN_RANK, trust_of
from tasks.twins import draw_twins
from tasks.webdataset_shards import scan
from tests import tiny

SAMPLES = 40


def samples_with(folder: Path, captions: list[str]) -> Stage:
    """A table of samples whose images are drawn and whose captions are given."""
    members = []
    for number, caption in enumerate(captions):
        members += [(f"s{number:04d}.jpg", tiny.draw(number)[0]), (f"s{number:04d}.txt", caption.encode())]
    found, _ = scan([tiny.write_tar(folder / "shard.tar", members)], lambda: None)
    rows = [{"train_id": number, **asdict(sample)} for number, sample in enumerate(found)]
    table = pa.Table.from_pylist(rows, schema=tables.SAMPLES.schema)
    commit_table(folder / "samples.parquet", table, tables.SAMPLES, key="samples", started=0.0)
    return samples_stage(folder / "samples.parquet")


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
    ("objective", "mend"), [(Objective.loss, "objective: output_norm"), (Objective.output_norm, "curvature.samples")]
)
def test_a_failed_test_names_the_line_to_change(objective: Objective, mend: str) -> None:
    ranks = [1] * 11 + [3652, 3689, 3897, 3918, 3953]
    trust = trust_of([rank_row(TWIN, rank) for rank in ranks] + [rank_row(PSEUDO, 1)] * 8, objective)
    (warning,) = trust.warnings
    assert "found 11 of 16 generated" in warning and "worst at rank 3,953" in warning and mend in warning
    assert "8 of 8 training images" in dict(trust.facts)["twins found"]


def test_a_teacher_that_finds_its_twins_is_not_warned_of() -> None:
    whole = {"metric": "spearman", "space": OTHER_TEACHER, "split": "test", "query_id": "", "value": 0.97}
    trust = trust_of([*[rank_row(TWIN, rank) for rank in (1, 1, 3)], whole], Objective.loss)
    assert not trust.warnings
    assert dict(trust.facts)["two teachers agree"] == "Spearman 0.970"
    assert trust_of([], Objective.loss).facts == []
