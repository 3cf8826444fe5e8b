"""Standard errors of first-order scores over the noise plan's draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.teachers import sample_gradients as gradients_module
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import SampleGradients, sample_gradients
from fastgda_core.teachers.scores import Scores, first_order_scores, first_order_scores_and_errors
from fastgda_core.teachers.training_loss import SampleBlock
from tests.fastgda_core.blocks import directional_derivative, make_block, many_samples, pick, random_updates

# Plans, and their draws in groups, by hand.
PLANS = {
    "2 draws": (NoisePlan(seed=5, timesteps=3, draws=2), [[0], [1]]),
    "weighted": (NoisePlan(seed=5, timesteps=(3, 99), draws=3, weights=(7.0, 0.5)), [[0], [1], [2]]),
    "more draws than groups": (NoisePlan(seed=5, timesteps=(40,), draws=6), [[0, 1], [2], [3, 4], [5]]),
    "antithetic": (NoisePlan(seed=5, timesteps=2, draws=4, antithetic=True), [[0, 1], [2, 3]]),
}


def by_hand(groups: list[list[int]], of_groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over all draws and its standard error from the groups' means, (groups, n); a draw counts as any other.

    Groups of one size: the deviation of their means by the root of their number.
    """
    sizes = torch.tensor([float(len(members)) for members in groups], dtype=torch.float64)[:, None]
    mean = (of_groups * sizes).sum(0) / sizes.sum()
    of_one_draw = ((of_groups - mean).square() * sizes).sum(0) / (len(groups) - 1)
    return mean, (of_one_draw / sizes.sum()).sqrt()


@pytest.mark.integration
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
def test_errors_are_those_of_groups_of_draws_by_a_plain_loop_in_float64(
    tiny_model: DiffusionModel, block: SampleBlock, name: str, selection: str
) -> None:
    """Steady and moving inputs; samples of several captions."""
    plan, groups = PLANS[name]
    layers = select_layers(tiny_model.denoiser, selection)
    updates = random_updates(layers, queries=1)
    update = {name: change[0] for name, change in updates.items()}
    found = first_order_scores_and_errors(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    of_groups = [directional_derivative(tiny_model, plan, block, update, draws=members) for members in groups]
    mean, error = by_hand(groups, torch.stack(of_groups))
    assert found.errors.shape == found.values.shape == (1, len(block.train_ids))
    torch.testing.assert_close(found.values[0], mean, rtol=0, atol=1e-4 * mean.norm().item())
    torch.testing.assert_close(found.errors[0], error, rtol=0, atol=1e-4 * mean.norm().item())


def test_groups_of_one_size_have_the_textbook_standard_error() -> None:
    means = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    _, error = by_hand([[0, 1], [2, 3], [4, 5]], means)
    torch.testing.assert_close(error, means.std(0) / 3**0.5)


@pytest.mark.heavy
def test_error_is_that_of_the_flip_whose_score_is_taken(tiny_model: DiffusionModel, layers: dict[str, Layer]) -> None:
    plan, groups = PLANS["2 draws"]
    block, updates = make_block(tiny_model, flips=True), random_updates(layers, queries=1)
    update = {name: change[0] for name, change in updates.items()}
    found = first_order_scores_and_errors(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    (first, error), (mirrored, of_mirrored) = (
        by_hand(
            groups,
            torch.stack([directional_derivative(tiny_model, plan, block, update, flip, each) for each in groups]),
        )
        for flip in (0, 1)
    )
    assert 0 < (mirrored > first).sum() < len(first)
    expected = torch.where(mirrored > first, of_mirrored, error)
    torch.testing.assert_close(found.errors[0], expected, rtol=0, atol=1e-4 * first.norm().item())


@pytest.mark.parametrize(
    "plan",
    [NoisePlan(seed=5, timesteps=4, draws=1), NoisePlan(seed=5, timesteps=2, draws=2, antithetic=True)],
    ids=["one draw", "one antithetic pair"],
)
def test_nothing_is_known_of_the_noise_of_a_single_draw(
    tiny_model: DiffusionModel,
    block: SampleBlock,
    layers: dict[str, Layer],
    updates: dict[str, Tensor],
    plan: NoisePlan,
) -> None:
    found = first_order_scores_and_errors(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    assert found.errors.isnan().all()
    expected = first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    assert torch.equal(found.values, expected)


@pytest.mark.heavy
@pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
def test_scores_and_what_is_looked_at_are_the_same_with_errors(tiny_model: DiffusionModel, selection: str) -> None:
    layers, block = select_layers(tiny_model.denoiser, selection), make_block(tiny_model, flips=True)
    plan, updates, seen = NoisePlan(seed=5, timesteps=2, draws=4), random_updates(layers), list[SampleGradients]()
    found = first_order_scores_and_errors(tiny_model, layers, plan, block, [updates], MicroBatch(24), seen.append)
    expected = first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    (looked,), (gradients,) = seen, sample_gradients(tiny_model, layers, plan, block, MicroBatch(24))
    assert looked.names() == gradients.names() and looked.count == gradients.count
    for name in gradients.names():
        torch.testing.assert_close(looked.of(name), gradients.of(name), rtol=0, atol=1e-6 * gradients.of(name).norm())


@pytest.mark.heavy
def test_errors_do_not_depend_on_how_samples_queries_and_rows_are_cut(
    tiny_model: DiffusionModel, layers: dict[str, Layer]
) -> None:
    plan, block = NoisePlan(seed=5, timesteps=(10, 80), draws=3), many_samples(tiny_model, 70)
    updates = random_updates(layers, queries=3)
    helpings = [{name: change[part] for name, change in updates.items()} for part in (slice(0, 2), slice(2, 3))]
    found = first_order_scores_and_errors(tiny_model, layers, plan, block, helpings, MicroBatch(50))
    for samples in ([69, 0, 33], [12]):
        alone = first_order_scores_and_errors(tiny_model, layers, plan, pick(block, samples), [updates], MicroBatch(4))
        for ours, theirs in ((found.values, alone.values), (found.errors, alone.errors)):
            torch.testing.assert_close(ours[:, samples], theirs, rtol=0, atol=1e-5 * found.values.abs().max().item())


def test_gradients_of_all_groups_stay_within_the_memory_of_one(
    tiny_model: DiffusionModel, block: SampleBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers move with the timestep, four groups take as much as four samples."""
    layers = select_layers(tiny_model.denoiser, "all")
    plan = NoisePlan(seed=5, timesteps=1, draws=4)
    size = sum(4 * layer.weight.numel() + 4 * len(layer.weight) for layer in layers.values())
    monkeypatch.setattr(gradients_module, "CONTRACTED_BYTES", 10 * size)

    def held(groups: int) -> list[int]:
        several = sample_gradients(tiny_model, layers, plan, block, MicroBatch(24), groups)
        return [sum(values.numel() * 4 for values in some.moving.values()) for some in several]

    assert len(held(1)) == 1 and len(held(4)) == 4
    assert max(held(4)) <= 10 * size


@pytest.mark.integration
@pytest.mark.parametrize("draws", [2, 4])
def test_squared_errors_are_the_variance_over_plans_of_other_seeds(
    tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer], updates: dict[str, Tensor], draws: int
) -> None:
    """On average over 21 pairs and 60 seeds within a quarter, at timesteps that differ by far more than noise."""
    several = [_of_seed(tiny_model, block, layers, updates, draws, seed) for seed in range(60)]
    variance = torch.stack([scores.values for scores in several]).var(0).mean()
    estimate = torch.stack([scores.errors for scores in several]).square().mean()
    assert 0.8 < estimate / variance < 1.25


def _of_seed(
    model: DiffusionModel,
    block: SampleBlock,
    layers: dict[str, Layer],
    updates: dict[str, Tensor],
    draws: int,
    seed: int,
) -> Scores:
    plan = NoisePlan(seed=100 + seed, timesteps=(5, 90), draws=draws)
    return first_order_scores_and_errors(model, layers, plan, block, [updates], MicroBatch(64))
