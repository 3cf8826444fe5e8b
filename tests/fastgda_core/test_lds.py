from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastgda_core.evaluation.lds import difference, inclusion_effects, linear_datamodelling, predictions, reliability

MODELS, SAMPLES, QUERIES, WIDTH, RIDGE = 48, 60, 6, 5, 4.0


class LinearWorld:
    """Ridge regressions, whose retraining and whose leave-one-out have closed forms."""

    def __init__(self, noise: float = 0.0) -> None:
        self.generator = torch.Generator().manual_seed(1)
        truth = self._normal(WIDTH)
        self.inputs, self.queries = self._normal(SAMPLES, WIDTH), self._normal(QUERIES, WIDTH)
        self.targets = self.inputs @ truth + self._normal(SAMPLES)
        self.answers = self.queries @ truth + 3 * self._normal(QUERIES)
        self.kept = torch.stack(
            [torch.randperm(SAMPLES, generator=self.generator) < SAMPLES // 2 for _ in range(MODELS)]
        )
        self.losses = torch.stack([self.loss(mask) for mask in self.kept])
        self.losses += noise * self.losses.std(0) * self._normal(MODELS, QUERIES)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def solve(self, mask: Tensor) -> Tensor:
        x, y = self.inputs[mask], self.targets[mask]
        return torch.linalg.solve(x.T @ x + RIDGE * torch.eye(WIDTH, dtype=x.dtype), x.T @ y)

    def loss(self, mask: Tensor) -> Tensor:
        return (self.queries @ self.solve(mask) - self.answers).square()

    def leave_one_out(self) -> Tensor:
        """How much each query's loss rises without each sample, (queries, samples)."""
        every = torch.ones(SAMPLES, dtype=torch.bool)
        found = []
        for sample in range(SAMPLES):
            mask = every.clone()
            mask[sample] = False
            found.append(self.loss(mask) - self.loss(every))
        return torch.stack(found, dim=1)

    def influence(self) -> Tensor:
        """The same to first order: -<grad of the query's loss, H^-1 grad of the sample's>, by hand."""
        every = torch.ones(SAMPLES, dtype=torch.bool)
        theta = self.solve(every)
        hessian = self.inputs.T @ self.inputs + RIDGE * torch.eye(WIDTH, dtype=torch.float64)
        of_samples = self.inputs * (self.inputs @ theta - self.targets)[:, None]
        of_queries = 2 * self.queries * (self.queries @ theta - self.answers)[:, None]
        return of_queries @ torch.linalg.solve(hessian, of_samples.T)


def test_a_score_is_the_rank_correlation_of_sums_with_losses() -> None:
    world, scores = LinearWorld(), LinearWorld().influence()
    found = linear_datamodelling(world.kept, scores, world.losses)
    for query in range(QUERIES):
        sums = [float(scores[query][mask].sum()) for mask in world.kept]
        expected = stats.spearmanr(sums, (-world.losses[:, query]).tolist()).statistic
        assert found.by_query[query].item() == pytest.approx(expected, abs=1e-12)
    assert found.over_queries == pytest.approx(stats.sem(found.by_query.tolist()))


def test_a_pool_of_margins_and_masks_is_judged_as_in_kronfluences_example() -> None:
    """Its GLUE example has masks in float16, (models, samples), and margins, (models, queries), and sums negatively."""
    draw = np.random.default_rng(0)
    masks = (draw.random((100, 300)) < 0.5).astype(np.float16)
    scores = draw.standard_normal((40, 300)).astype(np.float32)
    margins = (-masks @ scores.T + 8 * draw.standard_normal((100, 40))).astype(np.float32).round(1)  # some are equal
    expected = [stats.spearmanr(-masks.astype(np.float32) @ row, margins[:, query]) for query, row in enumerate(scores)]
    found = linear_datamodelling(*map(torch.from_numpy, (masks > 0, scores, margins)))
    assert found.by_query.tolist() == pytest.approx([each.statistic for each in expected], abs=1e-6)
    assert len(np.unique(margins[:, 0])) < 100


def test_of_a_linear_model_influence_is_the_exact_leave_one_out_and_predicts_retraining() -> None:
    world = LinearWorld()
    exact, influence = world.leave_one_out(), world.influence()
    correlations = [stats.pearsonr(*pair).statistic for pair in zip(exact.tolist(), influence.tolist(), strict=True)]
    assert min(correlations) > 0.98
    scores = [linear_datamodelling(world.kept, each, world.losses).mean for each in (exact, influence)]
    assert min(scores) > 0.9
    assert abs(scores[0] - scores[1]) < 0.03


def test_the_truth_is_within_the_pools_reliability_and_a_shuffled_method_at_nought() -> None:
    world, again = LinearWorld(noise=0.7), LinearWorld(noise=0.7)
    again.losses = LinearWorld().losses + 0.7 * world.losses.std(0) * again._normal(MODELS, QUERIES)
    ceiling = reliability(world.losses, again.losses).mean().item()
    truth = linear_datamodelling(world.kept, world.leave_one_out(), world.losses)
    assert truth.mean == pytest.approx(ceiling, abs=2 * (truth.over_models + truth.over_queries))
    assert ceiling < 0.9
    shuffled = world.leave_one_out()[:, torch.randperm(SAMPLES, generator=world.generator)]
    nothing = linear_datamodelling(world.kept, shuffled, world.losses)
    assert nothing.interval[0] < 0 < nothing.interval[1]
    apart = difference(world.kept, world.leave_one_out(), shuffled, world.losses)
    assert apart.mean == pytest.approx(truth.mean - nothing.mean)
    assert apart.over_queries == pytest.approx(stats.sem((truth.by_query - nothing.by_query).tolist()))
    same = truth.ahead_of(linear_datamodelling(world.kept, 2 * world.leave_one_out(), world.losses))
    assert (same.mean, same.over_models, same.interval) == (0.0, 0.0, (0.0, 0.0)), "drawn pools are the same for both"
    assert apart.interval[0] > 0


def test_the_error_over_models_is_that_of_pools_drawn_anew() -> None:
    """By the jackknife of one pool. Of 12 models, whose ranks are few, it is a third too wide."""
    world = LinearWorld()
    scores = world.influence()
    means, errors = [], []
    for _ in range(200):
        kept = torch.stack([torch.randperm(SAMPLES, generator=world.generator) < SAMPLES // 2 for _ in range(MODELS)])
        losses = torch.stack([world.loss(mask) for mask in kept])
        losses += losses.std(0) * world._normal(MODELS, QUERIES)
        found = linear_datamodelling(kept, scores, losses) if len(errors) < 20 else None
        errors += [found.over_models] if found else []
        means.append(found.mean if found else _mean(kept, scores, losses))
    assert sum(errors) / len(errors) == pytest.approx(torch.tensor(means).std().item(), rel=0.3)


def _mean(kept: Tensor, scores: Tensor, losses: Tensor) -> float:
    rows = zip(predictions(kept, scores).tolist(), (-losses.T).tolist(), strict=True)
    return float(torch.tensor([stats.spearmanr(*row).statistic for row in rows]).mean())


def test_two_models_have_no_order() -> None:
    with pytest.raises(ValueError, match="2 models have no order: retrain at least three"):
        linear_datamodelling(torch.ones(2, 4, dtype=torch.bool), torch.ones(1, 4), torch.ones(2, 1))


def test_the_effect_of_a_sample_is_the_difference_of_mean_losses_with_welchs_error() -> None:
    draw = torch.Generator().manual_seed(3)
    kept = torch.rand(12, 5, generator=draw) < 0.5
    kept[:, 3], kept[:, 4] = True, torch.arange(12) == 0  # in all models, and in one
    losses = 0.2 + torch.rand(12, 2, generator=draw)
    values, errors = inclusion_effects(kept, losses)
    assert values[:, 3:].isnan().all() and errors[:, 3:].isnan().all()
    for query in range(2):
        shares = (losses[:, query].double() / losses[:, query].double().mean()).numpy()
        for sample in range(3):
            with_it, without = shares[kept[:, sample].numpy()], shares[~kept[:, sample].numpy()]
            found = stats.ttest_ind(with_it, without, equal_var=False)
            assert float(values[query, sample]) == pytest.approx(with_it.mean() - without.mean())
            assert float(values[query, sample] / errors[query, sample]) == pytest.approx(found.statistic)
