"""A tiny world of another target, trained, judged and reported, and found again; what a variant changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import judged_teachers, judged_worlds
from benchmarks.judged_worlds import VARIANTS, Variant, judge, ranks_by_pixels, report
from tasks.config.judging import RetrainConfig
from tasks.demo import judge_world
from tasks.demo.openmoji import write_shards

SAMPLES, QUERIES, TWINS = 24, 5, 3


@pytest.mark.parametrize("name", list(VARIANTS)[1:])
def test_a_world_differs_from_the_judges_in_what_its_name_says(name: str) -> None:
    variant, base = VARIANTS[name], Variant()
    changed = [variant.width != base.width, variant.target != base.target, *variant.recipe]
    assert sum(map(bool, changed)) == 1 + name.count(",")
    recipe: dict[str, Any] = yaml.safe_load(judge_world.CONFIG.read_text())["judge"]["retrain"]
    assert RetrainConfig(**recipe | variant.recipe) != RetrainConfig(**recipe) or not variant.recipe


def test_the_rank_of_an_own_picture_is_that_of_the_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    every = torch.randn(12, 3, 2, 2, generator=draw) + 5  # what all have in common must not count
    drawn, own = every[[4, 7, 2]] + torch.randn(3, 3, 2, 2, generator=draw), torch.tensor([4, 7, 9])
    flat = every.flatten(1).double().numpy()
    expected = []
    for picture, mine in zip(drawn.flatten(1).double().numpy(), own.tolist(), strict=True):
        a = picture - flat.mean(0)
        near = [float(a @ b / np.linalg.norm(b)) for b in flat - flat.mean(0)]
        expected.append(1 + sum(each > near[mine] for each in near))
    assert ranks_by_pixels(drawn, every, own).tolist() == expected


@pytest.mark.integration
def test_a_world_is_trained_judged_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged_teachers, "FISHER_ROWS", 32)
    monkeypatch.setattr(judged_teachers, "PAIRS", 8)
    monkeypatch.setattr(judged_worlds, "DRAWN", 6)
    monkeypatch.setitem(VARIANTS, "tiny", Variant(width=16, target="epsilon", recipe={"steps": 4}))
    shards = tmp_path / "shards"
    write_shards(shards, lambda every: judge_world.choose(every)[:SAMPLES])
    base = yaml.safe_load(judge_world.CONFIG.read_text())
    base["judge"] |= {"subsets": 4, "again": 3, "draws": 4}
    base["queries"] |= {"steps": 2, "split": {"train": 1, "validation": 2, "test": 2}, "twins": TWINS}
    base["queries"]["captions"] = base["queries"]["captions"][:QUERIES]

    found = judge("tiny", tmp_path, shards, base)
    model = found.world.context.model()
    assert model.schedule.scheduler.config.prediction_type == "epsilon"
    assert tuple(model.denoiser.config.block_out_channels) == (16,)
    assert {int(row.sum()) for row in found.world.kept} == {SAMPLES // 2}
    assert {tuple(scores.shape) for scores in found.scores.values()} == {(QUERIES + 2 * TWINS, SAMPLES)}
    published, tied = found.scores[judged_worlds.PUBLISHED], found.scores[judged_worlds.TIED]
    torch.testing.assert_close(tied, published.clamp_min(0))
    lines = report([found]).splitlines()
    assert [line.split(" | ")[0] for line in lines].count("| tiny") == 3
    assert all(len(set(map(str.count, block, "|" * len(block)))) == 1 for block in _tables(lines))

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = judge("tiny", tmp_path, shards, base)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == kept
    for name, scores in found.scores.items():
        assert torch.equal(again.scores[name], scores)


def _tables(lines: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in lines:
        found[-1].append(line) if line.startswith("|") else found.append([])
    return [table for table in found if table]
