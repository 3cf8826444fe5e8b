"""The objective `ratio` against ratios of losses by hand, from two forwards in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import CommonNoisePlan, NoisePlan, gaussian_noise, stream_key
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.sketches.eigen import EigenSketch, sample_moments
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.registry import TEACHERS, UnlearningTeacher
from fastgda_core.teachers.sample_gradients import sample_gradients
from fastgda_core.teachers.scores import base_losses, exact_scores, first_order_scores, first_order_scores_and_errors
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import query_gradient
from tests.fastgda_core.blocks import (
    by_parameter,
    double_denoiser,
    make_block,
    pick,
    random_updates,
    squared_residual,
)
from tests.fastgda_core.test_architectures import any_fisher

EPSILON = 1e-3  # as sony/mucs has it
SOME = [0, 1, 4]  # samples of a block: the first has two captions
PLANS = {
    "even": CommonNoisePlan(seed=5, timesteps=4, draws=2),
    "weighted": CommonNoisePlan(seed=5, timesteps=(3, 40, 99), draws=2, weights=(1.0, 7.0, 0.5)),
    "antithetic": CommonNoisePlan(seed=5, timesteps=3, draws=2, antithetic=True),
}


@pytest.fixture(params=PLANS, ids=list(PLANS))
def plan(request: pytest.FixtureRequest) -> CommonNoisePlan:
    return PLANS[request.param]


@pytest.fixture
def ratio_model(tiny_model: DiffusionModel) -> DiffusionModel:
    return tiny_model.with_objective(Objective.ratio)


def losses_by_hand(
    model: DiffusionModel, denoiser: nn.Module, plan: NoisePlan, block: SampleBlock, sample: int, flip: int
) -> tuple[Tensor, Tensor]:
    """The loss at each (caption, timestep, draw) of a sample, and its weight in the mean; one noise for all samples."""
    grid = plan.timestep_values(model.schedule.train_timesteps).tolist()
    key, text, timesteps, noise, weights = stream_key(plan.seed, "training samples"), [], [], [], []
    for caption in (block.owner == sample).nonzero().flatten().tolist():
        for timestep, weight in zip(grid, plan.weights or [1.0] * len(grid), strict=True):
            for draw in range(plan.draws):
                place = (torch.tensor([each]) for each in (0, timestep, draw // 2 if plan.antithetic else draw))
                drawn = gaussian_noise(key, *place, model.latent_shape)[0]
                noise.append(-drawn if plan.antithetic and draw % 2 else drawn)
                text.append(block.condition["encoder_hidden_states"][caption])
                timesteps.append(timestep)
                weights.append(weight)
    clean = block.latents[sample, flip].expand(len(noise), *model.latent_shape)
    losses = squared_residual(model, denoiser, clean, torch.stack(text), torch.tensor(timesteps), torch.stack(noise))
    share = torch.tensor(weights, dtype=torch.float64)
    return losses, share / share.sum()


@torch.no_grad()
def ratios_by_hand(model: DiffusionModel, plan: NoisePlan, block: SampleBlock, update: Mapping[str, Tensor]) -> Tensor:
    """The mean of (after - before) / (after + before + epsilon) of every sample, the larger of its flips, (n,)."""
    before = double_denoiser(model)
    after = double_denoiser(model)
    for name, change in by_parameter(after, update).items():
        after.get_parameter(name).add_(change)
    found = torch.empty(len(block.train_ids), block.flips, dtype=torch.float64)
    for sample in range(len(found)):
        for flip in range(block.flips):
            old, share = losses_by_hand(model, before, plan, block, sample, flip)
            new, _ = losses_by_hand(model, after, plan, block, sample, flip)
            found[sample, flip] = (share * (new - old) / (new + old + EPSILON)).sum()
    return found.amax(1)


@pytest.mark.integration
def test_exact_scores_are_mean_ratios_of_two_forwards(
    tiny_model: DiffusionModel, ratio_model: DiffusionModel, plan: CommonNoisePlan
) -> None:
    """A large step, where no expansion holds; samples with one caption and with two, mirrored images."""
    block, layers = pick(make_block(tiny_model, flips=True), SOME), select_layers(tiny_model.denoiser, "all")
    update = {name: change[0] for name, change in random_updates(layers, queries=1).items()}
    base = base_losses(ratio_model, plan, block, MicroBatch(24))
    found = exact_scores(ratio_model, layers, plan, block, base, update, MicroBatch(7))
    expected = ratios_by_hand(tiny_model, plan, block, update)
    assert 0.01 < expected.abs().max() <= 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.norm().item())


@pytest.mark.integration
@pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
def test_first_order_scores_are_the_limit_of_a_small_step(
    tiny_model: DiffusionModel, ratio_model: DiffusionModel, plan: CommonNoisePlan, selection: str
) -> None:
    block, layers = pick(make_block(tiny_model, flips=True), SOME), select_layers(tiny_model.denoiser, selection)
    updates = random_updates(layers, queries=1)
    double = ratio_model.in_precision(Precision.float64)
    of_double = select_layers(double.denoiser, selection)
    found = first_order_scores(double, of_double, plan, block, [updates], MicroBatch(24))
    step, one_flip = 1e-4, replace(block, latents=block.latents[:, :1])
    single = first_order_scores(double, of_double, plan, one_flip, [updates], MicroBatch(24))
    assert bool((found >= single - 1e-9).all())
    ahead, behind = (
        ratios_by_hand(tiny_model, plan, one_flip, {name: sign * step * change[0] for name, change in updates.items()})
        for sign in (1, -1)
    )
    central = (ahead - behind) / (2 * step)
    torch.testing.assert_close(single[0], central, rtol=0, atol=1e-5 * central.norm().item())


def test_a_score_is_the_same_alone_and_in_any_batch(
    ratio_model: DiffusionModel, plan: CommonNoisePlan, block: SampleBlock
) -> None:
    layers = select_layers(ratio_model.denoiser, "cross-attn-kv")
    updates = random_updates(layers, queries=1)
    one = {name: change[0] for name, change in updates.items()}
    first = first_order_scores(ratio_model, layers, plan, block, [updates], MicroBatch(24))
    base = base_losses(ratio_model, plan, block, MicroBatch(24))
    exact = exact_scores(ratio_model, layers, plan, block, base, one, MicroBatch(24))
    for samples in ([6, 2, 0, 5, 1, 4, 3], [6]):
        part = pick(block, samples)
        again = first_order_scores(ratio_model, layers, plan, part, [updates], MicroBatch(5))
        torch.testing.assert_close(again, first[:, samples], rtol=0, atol=1e-5 * first.abs().max().item())
        base = base_losses(ratio_model, plan, part, MicroBatch(5))
        again = exact_scores(ratio_model, layers, plan, part, base, one, MicroBatch(5))
        torch.testing.assert_close(again, exact[samples], rtol=0, atol=1e-4 * exact.abs().max().item())


def test_every_sample_sees_the_same_noise(plan: CommonNoisePlan) -> None:
    places = torch.tensor([3, 2**33 + 3]), torch.tensor([0, 1]), torch.tensor([0, 4])
    first, second = plan.noise(*places, torch.tensor([40, 40]), torch.tensor([1, 1]), (4, 2, 2))
    assert torch.equal(first, second)
    other, _ = plan.noise(*places, torch.tensor([41, 40]), torch.tensor([1, 1]), (4, 2, 2))
    assert not torch.equal(first, other)


def test_standard_errors_are_those_of_the_draws(ratio_model: DiffusionModel, block: SampleBlock) -> None:
    """Two draws make two groups, whose own scores are those of plans with one draw each."""
    layers = select_layers(ratio_model.denoiser, "cross-attn-kv")
    updates, plan = random_updates(layers, queries=1), CommonNoisePlan(seed=5, timesteps=4, draws=2)
    found = first_order_scores_and_errors(ratio_model, layers, plan, block, [updates], MicroBatch(24))
    first = first_order_scores(ratio_model, layers, replace(plan, draws=1), block, [updates], MicroBatch(24))
    torch.testing.assert_close(found.errors, (first - found.values).abs(), rtol=1e-3, atol=1e-6)


def test_a_query_is_unlearned_by_its_loss() -> None:
    assert [each.of_query for each in (Objective.loss, Objective.output_norm, Objective.ratio)] == [
        Objective.loss,
        Objective.output_norm,
        Objective.loss,
    ]


def test_sketches_of_all_directions_give_the_scores(ratio_model: DiffusionModel, block: SampleBlock) -> None:
    layers, plan = select_layers(ratio_model.denoiser, "cross-attn-kv"), PLANS["weighted"]
    fisher = any_fisher(layers)
    query = {name: change[0] for name, change in random_updates(layers, queries=1).items()}
    update = {name: fisher.solve(name, change)[None] for name, change in query.items()}
    (expected,) = first_order_scores(ratio_model, layers, plan, block, [update], MicroBatch(24))
    (gradients,) = sample_gradients(ratio_model, layers, plan, block, MicroBatch(24))
    moments = sample_moments(fisher, [gradients])
    sketch = EigenSketch.of_most_energy(fisher, moments, moments, 10**9)
    found = (sketch.of_samples(gradients)[:, 0].double() @ sketch.of_query(query).double()).float()
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["abu", "abu_plus", "abu_plus_first_order"])
def test_every_unlearning_teacher_scores_by_ratios(ratio_model: DiffusionModel, block: SampleBlock, name: str) -> None:
    """The small step of a real query's gradient: exact and first-order teachers name the same order."""
    teacher, plan = TEACHERS[name], PLANS["even"]
    assert isinstance(teacher, UnlearningTeacher)
    model = ratio_model.in_precision(Precision.float64)
    layers = select_layers(model.denoiser, "cross-attn-kv")
    caption = {key: value[:1] for key, value in block.condition.items()}
    gradient = query_gradient(
        model.with_objective(model.objective.of_query), layers, block.latents[0, 0], caption,
        owner=1, seed=0, pairs=8, micro_batch=MicroBatch(8),
    )  # fmt: skip
    updates = {key: 1e-4 * change[None] for key, change in gradient.items()}
    base = None if teacher.first_order else base_losses(model, plan, block, MicroBatch(24))
    found = teacher.scores(model, layers, plan, block, [updates], base, MicroBatch(24)).values
    expected = first_order_scores(model, layers, plan, block, [updates], MicroBatch(24))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.norm().item())


def test_bf16_ranks_as_float64_does(ratio_model: DiffusionModel, block: SampleBlock) -> None:
    """What the precision check of a run asks."""
    plan, updates = PLANS["even"], random_updates(select_layers(ratio_model.denoiser, "cross-attn-kv"))
    found = []
    for precision in (Precision.bf16, Precision.float64):
        model = ratio_model.in_precision(precision)
        layers = select_layers(model.denoiser, "cross-attn-kv")
        found.append(first_order_scores(model, layers, plan, block, [updates], MicroBatch(24)))
    assert (found[0] - found[1]).norm() < 0.03 * found[1].norm()
