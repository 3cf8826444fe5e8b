"""MUCS's bounded ascent against a plain loop in float64: one forward after another, and AdamW by its formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.loss import take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import stream_key
from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import NonFiniteLoss
from fastgda_core.evaluation.retraining import to_train
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.mucs import Ascent, Unlearned, unlearn, untrained_loss
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import moved
from tests.fastgda_core.blocks import TRAIN_TIMESTEPS, double_denoiser, make_block, squared_residual

ASCENT = Ascent(learning_rate=3e-3, forget_weight=0.2, null_loss=1.2, rows=4, most_steps=6, seed=3)
OWNER = 41
BETAS, EPSILON, DECAY = (0.9, 0.999), 1e-8, 0.01  # torch's of AdamW, and sony/mucs's weight_decay


@pytest.fixture
def model(tiny_model: DiffusionModel) -> DiffusionModel:
    return tiny_model.in_precision(Precision.float64)


@pytest.fixture
def latent(tiny_model: DiffusionModel) -> Tensor:
    return torch.randn(tiny_model.latent_shape, generator=torch.Generator().manual_seed(8))


def unlearned(
    model: DiffusionModel,
    block: SampleBlock,
    latent: Tensor,
    ascent: Ascent = ASCENT,
    *,
    owner: int = OWNER,
    at_a_time: int = 100,
    layers: str = "mlp",
) -> Unlearned:
    condition = model.encode_captions(["a red circle"])
    chosen = select_layers(model.denoiser, layers)
    return unlearn(model, chosen, block, latent, condition, ascent, owner=owner, micro_batch=MicroBatch(at_a_time))


@dataclass
class ByHand:
    weights: dict[str, Tensor]
    forget_losses: list[float]
    bounded: int  # forwards of the query at the bound


def by_hand(
    model: DiffusionModel, layers: dict[str, Layer], block: SampleBlock, latent: Tensor, ascent: Ascent, steps: int
) -> ByHand:
    """So many steps: each forward by itself, the gradient of their sum, AdamW written out."""
    denoiser = double_denoiser(model)
    weights = {name: denoiser.get_submodule(name).weight.requires_grad_(True) for name in layers}
    first, second = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    draw = torch.Generator().manual_seed(stream_key(ascent.seed, f"MUCS {OWNER}")[0])
    query_text = model.encode_captions(["a red circle"])["encoder_hidden_states"]
    count, waiting, found = len(block.train_ids), list[int](), ByHand(weights, [], 0)
    for step in range(1, steps + 2):
        if len(waiting) < ascent.rows:
            waiting = torch.randperm(count, generator=draw).tolist()
        images, waiting = waiting[: ascent.rows], waiting[ascent.rows :]
        pick, flips = (
            torch.rand(ascent.rows, generator=draw),
            torch.randint(block.flips, (ascent.rows,), generator=draw),
        )
        kept = [torch.randint(TRAIN_TIMESTEPS, (ascent.rows,), generator=draw)]
        kept.append(torch.randn(ascent.rows, *model.latent_shape, generator=draw))
        asked = [torch.randint(TRAIN_TIMESTEPS, (ascent.rows,), generator=draw)]
        asked.append(torch.randn(ascent.rows, *model.latent_shape, generator=draw))
        total, forget = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for row in range(ascent.rows):
            captions = (block.owner == images[row]).nonzero().flatten()
            text = block.condition["encoder_hidden_states"][captions[int(pick[row] * len(captions))]][None]
            clean = block.latents[images[row], flips[row]][None]
            total = total + squared_residual(model, denoiser, clean, text, kept[0][[row]], kept[1][[row]])[0]
            loss = squared_residual(model, denoiser, latent[None], query_text, asked[0][[row]], asked[1][[row]])[0]
            if loss > ascent.null_loss:
                loss, found.bounded = torch.tensor(ascent.null_loss, dtype=torch.float64), found.bounded + 1
            forget = forget + loss
        found.forget_losses.append(float(forget.detach()) / ascent.rows)
        if step > steps:
            return found
        gradients = torch.autograd.grad((total - ascent.forget_weight * forget) / ascent.rows, list(weights.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
                second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
                length = (second[name] / (1 - BETAS[1] ** step)).sqrt() + EPSILON
                weight.mul_(1 - ascent.learning_rate * DECAY)
                weight.sub_(ascent.learning_rate * first[name] / (1 - BETAS[0] ** step) / length)
    raise AssertionError


@pytest.mark.parametrize("flips", [False, True])
def test_weights_are_those_of_a_plain_loop_in_float64(model: DiffusionModel, latent: Tensor, flips: bool) -> None:
    block, layers = make_block(model, flips=flips), select_layers(model.denoiser, "mlp")
    found = unlearned(model, block, latent)
    plain = by_hand(model, layers, block, latent, ASCENT, found.steps)
    assert found.steps > 2 and 0 < plain.bounded < 4 * (found.steps + 1), "some forwards are at the bound, others not"
    assert found.forget_loss == pytest.approx(plain.forget_losses[-1], rel=1e-9)
    with moved(layers, found.update):
        for name, weight in plain.weights.items():
            torch.testing.assert_close(layers[name].weight, weight.detach(), rtol=1e-6, atol=1e-9)


def test_it_ends_at_95_percent_of_the_untrained_loss_and_never_goes_beyond_it(
    model: DiffusionModel, block: SampleBlock, latent: Tensor
) -> None:
    long = replace(ASCENT, most_steps=200, learning_rate=2e-2, null_loss=1.3)
    found = unlearned(model, block, latent, long)
    assert found.reached and 1 < found.steps < 200 and 0.95 * 1.3 <= found.forget_loss <= 1.3
    before = unlearned(model, block, latent, replace(long, most_steps=found.steps - 1))
    assert not before.reached and before.forget_loss < 0.95 * 1.3, "and no step later than that"


def test_a_query_that_the_model_does_not_know_moves_nothing(
    model: DiffusionModel, block: SampleBlock, latent: Tensor
) -> None:
    found = unlearned(model, block, latent, replace(ASCENT, null_loss=0.01))
    assert found.reached and found.steps == 0 and found.forget_loss == pytest.approx(0.01)
    assert all(not change.any() for change in found.update.values())


def test_where_the_bound_is_far_it_ends_after_most_steps_and_says_so(
    model: DiffusionModel, block: SampleBlock, latent: Tensor
) -> None:
    found = unlearned(model, block, latent, replace(ASCENT, null_loss=50.0, most_steps=2))
    assert (found.steps, found.reached) == (2, False)


def test_retained_images_keep_their_loss_better_than_without_them(
    model: DiffusionModel, block: SampleBlock, latent: Tensor
) -> None:
    """A query's weight of a million is an ascent that retains nothing; AdamW's steps are of one size in both."""
    far = replace(ASCENT, most_steps=25, null_loss=50.0)
    layers, rows = select_layers(model.denoiser, "mlp"), 200
    draw = torch.Generator().manual_seed(1)
    timesteps, noise = torch.randint(TRAIN_TIMESTEPS, (rows,), generator=draw), torch.randn(rows, *model.latent_shape)
    first = (block.caption_number == 0).nonzero().flatten()
    images = torch.randint(len(first), (rows,), generator=draw)
    losses = []
    for weight in (0.2, 1e6):
        with moved(layers, unlearned(model, block, latent, replace(far, forget_weight=weight)).update):
            inputs = block.latents[images, 0], take(block.condition, first[images]), timesteps, noise
            losses.append(model.losses(*inputs).mean().item())
    assert losses[0] < losses[1]


def test_only_the_chosen_weights_move_and_the_model_is_left_as_it_was(
    model: DiffusionModel, block: SampleBlock, latent: Tensor
) -> None:
    before = {name: weight.clone() for name, weight in model.denoiser.state_dict().items()}
    found = unlearned(model, block, latent)
    layers = select_layers(model.denoiser, "mlp")
    assert found.update.keys() == layers.keys()
    for name, change in found.update.items():
        of_weight = layers[name].weight[0].numel()
        assert change[:, :of_weight].any() and not change[:, of_weight:].any(), "biases are frozen"
    assert not any("attn" in name for name in layers)
    for name, weight in model.denoiser.state_dict().items():
        assert torch.equal(weight, before[name])
    assert not any(weight.requires_grad for weight in model.denoiser.parameters())


def test_it_is_the_same_bit_for_bit_whatever_was_done_before_and_another_query_draws_anew(
    tiny_model: DiffusionModel, block: SampleBlock, latent: Tensor
) -> None:
    alone = unlearned(tiny_model, block, latent)
    other = unlearned(tiny_model, block, latent, owner=OWNER + 1)
    torch.manual_seed(5)
    again = unlearned(tiny_model, block, latent)
    assert alone.forget_loss == again.forget_loss
    for name, change in alone.update.items():
        assert torch.equal(change, again.update[name])
        assert not torch.equal(change, other.update[name])


def test_it_is_the_same_in_any_micro_batch(model: DiffusionModel, block: SampleBlock, latent: Tensor) -> None:
    whole, small = (unlearned(model, block, latent, at_a_time=size) for size in (100, 3))
    assert whole.steps == small.steps
    for name, change in whole.update.items():
        torch.testing.assert_close(change, small.update[name], rtol=1e-6, atol=1e-9)


def test_a_loss_that_is_no_number_is_told(model: DiffusionModel, block: SampleBlock, latent: Tensor) -> None:
    with pytest.raises(NonFiniteLoss, match=f"loss of sample {OWNER}"):
        unlearned(model, block, latent * torch.nan)


def test_the_untrained_loss_is_the_mean_of_other_draws(model: DiffusionModel, block: SampleBlock) -> None:
    untrained = to_train(model, seed=4, continued=False)
    found = untrained_loss(model, untrained, block, seed=1, micro_batch=MicroBatch(500))
    rows, draw = 4000, torch.Generator().manual_seed(2)
    captions = torch.randint(len(block.owner), (rows,), generator=draw)
    noise = torch.randn(rows, *model.latent_shape, generator=draw)
    timesteps = torch.randint(TRAIN_TIMESTEPS, (rows,), generator=draw)
    denoiser, text = to_train(model, seed=4, continued=False).double(), block.condition["encoder_hidden_states"]
    with torch.no_grad():
        clean = block.latents[block.owner[captions], 0]
        by_draws = squared_residual(model, denoiser, clean, text[captions], timesteps, noise)
    assert found == pytest.approx(by_draws.mean().item(), rel=0.02)
