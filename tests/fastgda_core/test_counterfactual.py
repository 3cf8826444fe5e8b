from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import mean_squared_error, roc_auc_score

from fastgda_core.evaluation.counterfactual import (
    Change,
    above_chance,
    compared,
    lead,
    loss_changes,
    pixel_mse,
    separation,
    smallest,
    union_of_first,
)


def test_a_change_is_a_share_of_the_loss_before() -> None:
    before = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    after = torch.tensor([[2.0, 4.0], [4.0, 2.0]])
    assert loss_changes(after, before).tolist() == [0.5, -0.25]


def test_the_best_is_marked_and_those_within_its_error() -> None:
    means = {"best": (2.0, 0.75), "as good": (2.0, 0.1), "close": (1.25, 0.25), "far": (0.25, 9.0)}
    places = {name: change.place for name, change in compared(means).items()}
    assert places == {"best": "best", "as good": "best", "close": "close", "far": ""}
    assert compared(means)["close"] == Change(1.25, 0.25, "close")
    lower = {name: change.place for name, change in compared(means, higher=False).items()}
    assert lower == {"best": "close", "as good": "close", "close": "close", "far": "best"}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_separation_is_the_area_under_the_curve(targets: list[int], controls: list[int]) -> None:
    found, error = separation(torch.tensor(targets, dtype=torch.float64), torch.tensor(controls, dtype=torch.float64))
    truth = [1] * len(targets) + [0] * len(controls)
    assert found == pytest.approx(roc_auc_score(truth, targets + controls))
    if min(len(targets), len(controls)) == 1:
        assert error == 0
        return
    # DeLong's components by ranks (Sun & Xu, 2014).
    together = rankdata(targets + controls)
    of_targets = (together[: len(targets)] - rankdata(targets)) / len(controls)
    of_controls = 1 - (together[len(targets) :] - rankdata(controls)) / len(targets)
    variance = of_targets.var(ddof=1) / len(targets) + of_controls.var(ddof=1) / len(controls)
    assert error == pytest.approx(variance**0.5)


def test_a_query_is_broken_where_it_lost_more_than_by_chance_and_at_the_smallest_count_that_breaks_it() -> None:
    draw = np.random.default_rng(0)
    random, changes = draw.normal(size=(8, 200)), draw.normal(size=200) + 1
    expected = changes > random.mean(0) + 2 * random.std(0, ddof=1)
    found = above_chance(torch.from_numpy(changes), torch.from_numpy(random))
    assert found.tolist() == expected.tolist() and 0 < expected.sum() < 200
    broken = torch.tensor([[True, False, False, False], [False, True, False, True], [True, True, True, False]])
    assert smallest([5, 10, 40], broken).tolist() == [5, 10, 40, 10]
    assert smallest([5], torch.tensor([[False, True]])).tolist() == [math.inf, 5]


def test_pictures_differ_by_the_mean_square_from_0_to_1() -> None:
    one, other = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    found = pixel_mse(torch.from_numpy(one), torch.from_numpy(other))
    expected = [mean_squared_error(a.ravel() / 255, b.ravel() / 255) for a, b in zip(one, other, strict=True)]
    assert found.tolist() == pytest.approx(expected)
    black, white = torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    assert pixel_mse(black, white).tolist() == [1.0]


def test_the_union_names_each_sample_once() -> None:
    scores = torch.tensor([[5.0, 4.0, 0.0, 1.0], [0.0, 3.0, 9.0, 1.0]])
    assert union_of_first(scores, 2).tolist() == [0, 1, 2]
    assert union_of_first(scores, 9).tolist() == [0, 1, 2, 3]


def test_a_lead_is_the_logarithm_of_the_ratio_of_the_losses() -> None:
    draw = np.random.default_rng(0)
    before, after, other = (torch.from_numpy(draw.uniform(0.5, 2, (3, 4))) for _ in range(3))
    found = lead(loss_changes(after, before), loss_changes(other, before))
    assert found.tolist() == pytest.approx([math.log(a / b) for a, b in zip(after.mean(0), other.mean(0), strict=True)])
