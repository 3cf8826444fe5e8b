from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import average_precision_score, ndcg_score, precision_score, recall_score

from fastgda_core.evaluation.ranking_metrics import (
    agreement,
    average_precision,
    descending_ranks,
    expected_random_agreement,
    expected_random_average_precision,
    kendall,
    ndcg,
    r_precision,
    recall,
    spearman,
    top_mask,
)


def precision_at_hits(hits: tuple[int, ...]) -> float:
    """Average precision of one ranked list of 0/1, by its definition."""
    return sum(sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit) / sum(hits)


@pytest.mark.integration
@pytest.mark.parametrize("levels", [None, 4], ids=["distinct scores", "many ties"])
def test_average_precision_equals_scikit_learn(levels: int | None) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1000, 60)) if levels is None else rng.integers(levels, size=(1000, 60)).astype(float)
    relevant = rng.random((1000, 60)) < rng.uniform(0.05, 0.9, size=(1000, 1))
    relevant[np.arange(1000), rng.integers(60, size=1000)] = True
    expected = [average_precision_score(truth, score) for truth, score in zip(relevant, scores, strict=True)]
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(relevant))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)


def test_items_left_out_with_minus_infinity_rank_last() -> None:
    scores = torch.tensor([[0.5, -torch.inf, 0.1, -torch.inf]])
    relevant = torch.tensor([[False, False, True, False]])
    assert average_precision(scores, relevant).item() == 0.5


def test_relevant_items_that_rank_last_alike_and_float32_are_as_scikit_learn_has_them() -> None:
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(200, 40)).astype(np.float32)
    relevant = rng.random((200, 40)) < 0.4
    relevant[:, 0] = True
    left_out = rng.random((200, 40)) < 0.3
    found = average_precision(torch.from_numpy(np.where(left_out, -np.inf, scores)), torch.from_numpy(relevant))
    ends = np.where(left_out, -1e9, scores)  # scikit-learn takes no infinities
    expected = [average_precision_score(truth, score) for truth, score in zip(relevant, ends, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("samples", "relevant"), [(n, r) for n in range(1, 7) for r in range(1, n + 1)])
def test_expected_random_average_precision_equals_the_mean_over_all_orders(samples: int, relevant: int) -> None:
    marks = [1] * relevant + [0] * (samples - relevant)
    values = [precision_at_hits(order) for order in itertools.permutations(marks)]
    assert expected_random_average_precision(samples, relevant) == pytest.approx(sum(values) / len(values), abs=1e-12)


@pytest.mark.parametrize(("samples", "relevant"), [(200, 1), (200, 20), (300, 150)])
def test_expected_random_average_precision_equals_a_monte_carlo_mean(samples: int, relevant: int) -> None:
    rng = np.random.default_rng(1)
    hits = rng.permuted(np.tile(np.arange(samples) < relevant, (4000, 1)), axis=1)
    precision = hits.cumsum(1) / np.arange(1, samples + 1)
    values = (precision * hits).sum(1) / relevant
    standard_error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - expected_random_average_precision(samples, relevant)) < 4 * standard_error


def test_spearman_equals_scipy() -> None:
    rng = np.random.default_rng(2)
    first = rng.normal(size=(20, 80))
    second = np.linspace(-1, 1, 20)[:, None] * first + rng.normal(size=(20, 80)) * 0.3
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    found = spearman(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("cutoff", [1, 7, 30])
def test_top_mask_picks_exactly_the_highest(cutoff: int) -> None:
    scores = np.random.default_rng(3).normal(size=(15, 30))
    mask = top_mask(torch.from_numpy(scores), cutoff).numpy()
    for row, chosen in zip(scores, mask, strict=True):
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-row)[:cutoff])


def test_top_mask_gives_ties_to_the_earlier_sample_and_keeps_the_count() -> None:
    mask = top_mask(torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [3.0, 3.0, 3.0, 1.0, 1.0]]), 2)
    assert mask.tolist() == [[True, True, False, False, False], [True, True, False, False, False]]


def test_what_is_tied_at_the_lowest_score_is_never_among_the_first_but_one_item_always_is() -> None:
    outside = -torch.inf
    scores = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [outside, 0.0, 5.0, 0.0], [1.0, 2.0, 4.0, 3.0]])
    mask = top_mask(scores, 3)
    assert mask.int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1]]
    assert descending_ranks(scores)[:2].tolist() == [[4, 1, 4, 2], [4, 4, 4, 4]]
    assert descending_ranks(scores)[2:].tolist() == [[4, 3, 1, 3], [4, 3, 1, 2]]


def tied_pairs(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with many ties, at the end, anywhere and everywhere, beside rows that have none."""
    rng = np.random.default_rng(8)
    first, second = rng.normal(size=(2, 40, samples))
    first[:20] = first[:20].clip(0)
    second[10:25] = rng.integers(3, size=(15, samples)) + 0.5 * (first[10:25] > 0)
    first[38], second[39] = 0.0, -1.0
    return first, second


@pytest.mark.parametrize("samples", [2, 5, 64, 301])
def test_rank_correlations_with_ties_are_scipys_and_0_where_nothing_is_ranked(samples: int) -> None:
    first, second = tied_pairs(samples)
    for measure, scipys in ((spearman, spearmanr), (kendall, kendalltau)):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constant rows
            expected = np.nan_to_num([scipys(a, b).statistic for a, b in zip(first, second, strict=True)])
        found = measure(torch.from_numpy(first), torch.from_numpy(second))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 10, 80])
def test_ndcg_of_tied_rankings_equals_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(9)
    gains, scores = rng.random((30, 80)), rng.normal(size=(30, 80)).clip(0).round(1)
    found = ndcg(torch.from_numpy(scores), torch.from_numpy(gains), k)
    expected = [ndcg_score(g[None], s[None], k=k) for g, s in zip(gains, scores, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("samples", [2, 3, 64, 65, 1000])
def test_kendall_equals_scipy(samples: int) -> None:
    rng = np.random.default_rng(4)
    first = rng.normal(size=(20, samples))
    second = np.linspace(-1, 1, 20)[:, None] * first + rng.normal(size=(20, samples)) * 0.3
    expected = [kendalltau(a, b).statistic for a, b in zip(first, second, strict=True)]
    found = kendall(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 10, 80, 100])
def test_ndcg_equals_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(5)
    gains, scores = rng.random((30, 80)), rng.normal(size=(30, 80))
    found = ndcg(torch.from_numpy(scores), torch.from_numpy(gains), k)
    expected = [ndcg_score(g[None], s[None], k=k) for g, s in zip(gains, scores, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 7, 80])
def test_recall_counts_the_relevant_among_the_first(k: int) -> None:
    rng = np.random.default_rng(6)
    scores, relevant = rng.normal(size=(30, 80)), rng.random((30, 80)) < 0.2
    relevant[:, 0] = True
    found = recall(torch.from_numpy(scores), torch.from_numpy(relevant), k).numpy()
    for value, score, truth in zip(found, scores, relevant, strict=True):
        first = set(np.argsort(-score)[:k])
        assert value == pytest.approx(len(first & set(np.flatnonzero(truth))) / truth.sum())


def test_r_precision_is_precision_and_recall_at_the_number_of_the_relevant() -> None:
    rng = np.random.default_rng(7)
    scores, relevant = rng.normal(size=(30, 80)), rng.random((30, 80)) < rng.uniform(0, 0.5, size=(30, 1))
    relevant[:, 0] = True
    for value, score, truth in zip(
        r_precision(*map(torch.from_numpy, (scores, relevant))), scores, relevant, strict=True
    ):
        marked = np.isin(np.arange(80), np.argsort(-score)[: truth.sum()])
        assert value == pytest.approx(precision_score(truth, marked)) == pytest.approx(recall_score(truth, marked))


TEACHERS = {
    "no ties": [3.0, 9.0, 1.0, 7.0, 5.0, 2.0],
    "four tied at the end": [0.0, 9.0, 0.0, 7.0, 0.0, 0.0],
    "one above": [0.0, 0.0, 0.0, 7.0, 0.0, 0.0],
}


@pytest.mark.parametrize("scores", TEACHERS.values(), ids=TEACHERS.keys())
def test_a_ranking_agrees_with_itself_and_the_mean_over_all_orders_is_chance(scores: list[float]) -> None:
    n, cutoffs = 6, [2, 4]
    teacher = torch.tensor([scores], dtype=torch.float64)
    perfect = agreement(teacher, teacher, cutoffs)
    assert all(value.item() == pytest.approx(1.0) for value in perfect.values())
    assert agreement(teacher, -teacher, cutoffs)["overlap", 2].item() == 0
    orders = torch.tensor(list(itertools.permutations(range(n))), dtype=torch.float64)
    means = agreement(teacher.expand(len(orders), n), orders, cutoffs)
    chance = expected_random_agreement(teacher[0], cutoffs)
    assert means.keys() == chance.keys()
    for measure, values in means.items():
        assert values.mean().item() == pytest.approx(chance[measure], abs=1e-9), measure


def test_a_teacher_that_ranks_nothing_agrees_with_no_order_more_than_with_another() -> None:
    nothing, order = torch.zeros(1, 6), torch.arange(6.0)[None]
    found, other = agreement(nothing, order, [2]), agreement(nothing, -order, [2])
    assert found["spearman", 0] == found["kendall", 0] == 0
    assert found["ndcg", 2] == other["ndcg", 2] == 1
