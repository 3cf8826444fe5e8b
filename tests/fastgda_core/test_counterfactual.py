from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fastgda_core.evaluation.counterfactual import Change, compared, loss_changes, separation, union_of_first


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
    found = separation(torch.tensor(targets, dtype=torch.float64), torch.tensor(controls, dtype=torch.float64))
    truth = [1] * len(targets) + [0] * len(controls)
    assert found == pytest.approx(roc_auc_score(truth, targets + controls))


def test_the_union_names_each_sample_once() -> None:
    scores = torch.tensor([[5.0, 4.0, 0.0, 1.0], [0.0, 3.0, 9.0, 1.0]])
    assert union_of_first(scores, 2).tolist() == [0, 1, 2]
    assert union_of_first(scores, 9).tolist() == [0, 1, 2, 3]
