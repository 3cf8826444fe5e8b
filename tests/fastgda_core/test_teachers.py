from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.loss import take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import NonFiniteLoss, UsageError
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import CONTRACTED_SAMPLES
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import moved, query_gradient
from tests.fastgda_core.blocks import (
    directional_derivative,
    double_denoiser,
    make_block,
    many_samples,
    pick,
    plain_losses,
    plain_rise,
    random_updates,
)

PLANS = {
    "even grid": NoisePlan(seed=5, timesteps=4, draws=2),
    "shifted grid": NoisePlan(seed=5, timesteps=4, draws=1, first_timestep=20),
    "listed": NoisePlan(seed=5, timesteps=(3, 40, 99), draws=2),
    "listed and weighted": NoisePlan(seed=5, timesteps=(3, 40, 99), draws=2, weights=(1.0, 7.0, 0.5)),
    "antithetic": NoisePlan(seed=5, timesteps=3, draws=3, antithetic=True),
}


@pytest.fixture(params=PLANS, ids=list(PLANS))
def any_plan(request: pytest.FixtureRequest) -> NoisePlan:
    return PLANS[request.param]


def query(updates: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: change[number] for name, change in updates.items()}


@pytest.mark.heavy
@torch.no_grad()
def test_losses_equal_a_plain_loop_in_float64(
    tiny_model: DiffusionModel, any_plan: NoisePlan, block: SampleBlock
) -> None:
    expected = plain_losses(tiny_model, double_denoiser(tiny_model), any_plan, block)
    found = training_losses(tiny_model, any_plan, block, MicroBatch(24))
    assert found.dtype == torch.float64
    assert found.shape == (len(block.train_ids), 1)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=0)


@pytest.mark.heavy
def test_weighted_loss_is_the_weighted_mean_of_the_losses_at_each_timestep(
    tiny_model: DiffusionModel, block: SampleBlock, updates: dict[str, Tensor], layers: dict[str, Layer]
) -> None:
    timesteps, weights = (3, 40, 99), (1.0, 7.0, 0.5)
    whole = NoisePlan(seed=5, timesteps=timesteps, draws=2, weights=weights)
    singles = [NoisePlan(seed=5, timesteps=(timestep,), draws=2) for timestep in timesteps]
    losses, scores = (
        [training_losses(tiny_model, plan, block, MicroBatch(24)) for plan in (whole, *singles)],
        [first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24)) for plan in (whole, *singles)],
    )
    for found, *parts in (losses, scores):
        expected = sum(weight * part for weight, part in zip(weights, parts, strict=True)) / sum(weights)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.integration
@pytest.mark.parametrize(("size", "antithetic"), [(1, False), (16, True), (1000, False)])
def test_loss_and_score_are_the_same_alone_in_any_batch_and_in_any_order(
    tiny_model: DiffusionModel, updates: dict[str, Tensor], layers: dict[str, Layer], size: int, antithetic: bool
) -> None:
    block = make_block(tiny_model)
    plan = NoisePlan(seed=5, timesteps=4, draws=2, antithetic=antithetic)
    losses = training_losses(tiny_model, plan, block, MicroBatch(24))
    scores = first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    rounding = 1e-5 * scores.abs().max().item()
    for samples in ([6, 2, 0, 5, 1, 4, 3], [4, 2], [0], [3], [6]):
        part = pick(block, samples)
        torch.testing.assert_close(
            training_losses(tiny_model, plan, part, MicroBatch(size)), losses[samples], rtol=1e-6, atol=0
        )
        found = first_order_scores(tiny_model, layers, plan, part, [updates], MicroBatch(size))
        torch.testing.assert_close(found, scores[:, samples], rtol=0, atol=rounding)


def test_changing_a_caption_changes_the_loss_of_its_own_sample_only(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock
) -> None:
    losses = training_losses(tiny_model, plan, block, MicroBatch(24))
    other = block.condition["encoder_hidden_states"].clone()
    other[1] = other[2]
    changed = replace(block, condition={"encoder_hidden_states": other})
    changed_losses = training_losses(tiny_model, plan, changed, MicroBatch(24))
    # Only sample 0 owns caption 1.
    assert changed_losses[0] != losses[0]
    torch.testing.assert_close(changed_losses[1:], losses[1:], rtol=1e-6, atol=0)


@pytest.mark.integration
@pytest.mark.parametrize("selection", ["cross-attn-kv", "cross-attn", "all"])
def test_first_order_scores_equal_the_derivative_along_each_update(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, selection: str
) -> None:
    """Steady and moving inputs, attention and convolutions, weights and biases."""
    layers = select_layers(tiny_model.denoiser, selection)
    updates = random_updates(layers)
    found = first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    assert found.shape == (3, len(block.train_ids))
    assert found.dtype == torch.float64
    for number, scores in enumerate(found):
        derivative = directional_derivative(tiny_model, plan, block, query(updates, number))
        torch.testing.assert_close(scores, derivative, rtol=0, atol=1e-4 * derivative.norm().item())


@pytest.mark.integration
def test_first_order_scores_equal_a_central_difference_in_float64(
    tiny_model: DiffusionModel, any_plan: NoisePlan, block: SampleBlock, layers: dict[str, Layer]
) -> None:
    updates = random_updates(layers, queries=1)
    found = first_order_scores(tiny_model, layers, any_plan, block, [updates], MicroBatch(24))[0]
    step = 1e-5
    ahead, behind = (
        plain_rise(tiny_model, any_plan, block, {name: sign * step * change[0] for name, change in updates.items()})
        for sign in (1, -1)
    )
    central = (ahead - behind) / (2 * step)
    torch.testing.assert_close(found, central, rtol=0, atol=1e-4 * central.norm().item())


@pytest.mark.heavy
@pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
def test_exact_scores_are_the_rise_of_the_loss_in_float64(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, selection: str
) -> None:
    """A large step, where the first order no longer holds."""
    layers = select_layers(tiny_model.denoiser, selection)
    update = {name: change[0] for name, change in random_updates(layers, queries=1).items()}
    base = training_losses(tiny_model, plan, block, MicroBatch(24))
    found = exact_scores(tiny_model, layers, plan, block, base, update, MicroBatch(24))
    expected = plain_rise(tiny_model, plan, block, update)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.norm().item())


@pytest.mark.heavy
def test_first_order_scores_do_not_depend_on_how_samples_and_queries_are_cut(
    tiny_model: DiffusionModel, layers: dict[str, Layer]
) -> None:
    """More samples than are held at a time, and queries that come in two helpings."""
    plan, block = NoisePlan(seed=5, timesteps=(10, 80), draws=1), many_samples(tiny_model, CONTRACTED_SAMPLES + 6)
    updates = random_updates(layers, queries=5)
    helpings = [{name: change[part] for name, change in updates.items()} for part in (slice(0, 2), slice(2, 5))]
    found = first_order_scores(tiny_model, layers, plan, block, helpings, MicroBatch(50))
    assert found.shape == (5, CONTRACTED_SAMPLES + 6)
    rounding = 1e-5 * found.abs().max().item()
    for samples in (list(range(60, 70)), [0, 69]):
        alone = first_order_scores(tiny_model, layers, plan, pick(block, samples), [updates], MicroBatch(7))
        torch.testing.assert_close(alone, found[:, samples], rtol=0, atol=rounding)


@pytest.mark.integration
class TestFlips:
    """Latents (n, 2, c, h, w): an image and its mirror image."""

    def test_losses_of_both_flips_equal_a_plain_loop(self, tiny_model: DiffusionModel, any_plan: NoisePlan) -> None:
        block, denoiser = make_block(tiny_model, flips=True), double_denoiser(tiny_model)
        found = training_losses(tiny_model, any_plan, block, MicroBatch(24))
        with torch.no_grad():
            expected = [plain_losses(tiny_model, denoiser, any_plan, block, flip) for flip in (0, 1)]
        torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=1e-5, atol=0)

    def test_flips_have_noise_of_their_own(self, tiny_model: DiffusionModel, plan: NoisePlan) -> None:
        latents = make_block(tiny_model).latents.repeat(1, 2, 1, 1, 1)
        same_image = replace(make_block(tiny_model), latents=latents)
        losses = training_losses(tiny_model, plan, same_image, MicroBatch(24))
        assert (losses[:, 0] != losses[:, 1]).all()

    @pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
    def test_first_order_score_is_the_larger_of_the_two(
        self, tiny_model: DiffusionModel, plan: NoisePlan, selection: str
    ) -> None:
        layers, block = select_layers(tiny_model.denoiser, selection), make_block(tiny_model, flips=True)
        updates = random_updates(layers, queries=1)
        (found,) = first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24))
        both = [directional_derivative(tiny_model, plan, block, query(updates, 0), flip) for flip in (0, 1)]
        larger = torch.maximum(*both)
        assert 0 < (larger == both[0]).sum() < len(larger)
        torch.testing.assert_close(found, larger, rtol=0, atol=1e-4 * larger.norm().item())

    def test_exact_score_is_the_larger_of_the_two(
        self, tiny_model: DiffusionModel, plan: NoisePlan, updates: dict[str, Tensor], layers: dict[str, Layer]
    ) -> None:
        block, update = make_block(tiny_model, flips=True), query(updates, 0)
        base = training_losses(tiny_model, plan, block, MicroBatch(24))
        found = exact_scores(tiny_model, layers, plan, block, base, update, MicroBatch(24))
        larger = torch.maximum(*(plain_rise(tiny_model, plan, block, update, flip) for flip in (0, 1)))
        torch.testing.assert_close(found, larger, rtol=0, atol=1e-3 * larger.norm().item())

    def test_first_flip_scores_as_the_sample_without_flips(
        self, tiny_model: DiffusionModel, plan: NoisePlan, updates: dict[str, Tensor], layers: dict[str, Layer]
    ) -> None:
        both, one = make_block(tiny_model, flips=True), make_block(tiny_model)
        losses = training_losses(tiny_model, plan, both, MicroBatch(24))
        torch.testing.assert_close(
            losses[:, :1], training_losses(tiny_model, plan, one, MicroBatch(24)), rtol=1e-6, atol=0
        )
        found, alone = (
            first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24)) for block in (both, one)
        )
        assert (found >= alone - 1e-5 * alone.abs().max()).all()


def snapshot(model: DiffusionModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}


def test_moved_weights_come_back_exactly(
    tiny_model: DiffusionModel, updates: dict[str, Tensor], layers: dict[str, Layer]
) -> None:
    before = snapshot(tiny_model)
    update = query(updates, 0)
    with moved(layers, update):
        for name, tensor in tiny_model.denoiser.state_dict().items():
            change = update.get(name.removesuffix(".weight"), torch.zeros(()))
            assert torch.equal(tensor, before[name] + change)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.denoiser.state_dict().items())


def test_moved_weights_and_biases_come_back_exactly_after_a_failure(tiny_model: DiffusionModel) -> None:
    before = snapshot(tiny_model)
    layers = select_layers(tiny_model.denoiser, "all")
    update = query(random_updates(layers), 0)
    with pytest.raises(KeyboardInterrupt), moved(layers, update):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.denoiser.state_dict().items())


@pytest.mark.heavy
@pytest.mark.parametrize("size", [8, 1000])
def test_a_loss_that_is_not_finite_names_sample_and_timestep(
    tiny_model: DiffusionModel,
    plan: NoisePlan,
    block: SampleBlock,
    updates: dict[str, Tensor],
    layers: dict[str, Layer],
    size: int,
) -> None:
    latents = block.latents.clone()
    latents[4, 0, 0, 0, 0] = torch.nan
    broken = replace(block, latents=latents)
    message = rf"sample {block.train_ids[4]} at timestep 0 is nan"
    with pytest.raises(NonFiniteLoss, match=message):
        training_losses(tiny_model, plan, broken, MicroBatch(size))
    with pytest.raises(NonFiniteLoss, match=message):
        first_order_scores(tiny_model, layers, plan, broken, [updates], MicroBatch(size))
    with pytest.raises(NonFiniteLoss, match=r"sample 77 at timestep \d+ is nan"):
        query_gradient(
            tiny_model,
            layers,
            latents[4, 0],
            take(block.condition, slice(0, 1)),
            owner=77,
            seed=0,
            pairs=4,
            micro_batch=MicroBatch(4),
        )


def test_a_layer_that_takes_no_part_is_named(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, layers: dict[str, Layer]
) -> None:
    strange = {**layers, "elsewhere.proj": torch.nn.Linear(2, 2)}
    with pytest.raises(UsageError, match=r"elsewhere\.proj takes no part in the forward pass.*teacher\.layers"):
        first_order_scores(tiny_model, strange, plan, block, [random_updates(strange)], MicroBatch(24))


@pytest.mark.heavy
def test_scoring_leaves_weights_and_hooks_as_they_were(
    tiny_model: DiffusionModel,
    plan: NoisePlan,
    block: SampleBlock,
    updates: dict[str, Tensor],
    layers: dict[str, Layer],
) -> None:
    before = snapshot(tiny_model)
    losses = training_losses(tiny_model, plan, block, MicroBatch(24))
    first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    exact_scores(tiny_model, layers, plan, block, losses, query(updates, 0), MicroBatch(24))
    assert torch.equal(training_losses(tiny_model, plan, block, MicroBatch(24)), losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.denoiser.state_dict().items())
    assert not any(layer._forward_hooks for layer in layers.values())
