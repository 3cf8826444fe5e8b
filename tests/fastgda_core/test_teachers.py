from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastgda_core.curvature.ekfac import EkfacFisher, fit_ekfac
from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel, load_model
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stream_key, uniform
from fastgda_core.teachers.gradients import cross_attention_kv_layers
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import moved, query_gradient, unlearning_update
from tests.fastgda_core.conftest import make_block

TRAIN_TIMESTEPS = 100


def double_unet(model: DiffusionModel) -> nn.Module:
    """The denoiser in float64 with plain attention, which forward-mode differentiation understands."""
    unet = copy.deepcopy(model.unet).double().to(memory_format=torch.contiguous_format)
    unet.set_attn_processor(AttnProcessor())
    return unet


def squared_residual(
    model: DiffusionModel,
    unet: Callable[..., tuple[Tensor, ...]],
    clean: Tensor,
    text: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """Mean squared epsilon error of each row, in float64; the tiny model predicts epsilon."""
    alpha_bar = model.scheduler.alphas_cumprod.double()[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * clean.double() + (1 - alpha_bar).sqrt() * noise.double()
    predicted = unet(noisy, timesteps, encoder_hidden_states=text.double(), return_dict=False)[0]
    return (noise.double() - predicted).square().mean((1, 2, 3))


def one_loss(
    model: DiffusionModel, unet: Callable[..., tuple[Tensor, ...]], plan: NoisePlan, block: SampleBlock, sample: int
) -> Tensor:
    """L of one sample in float64: its captions, timesteps and draws one after another, then their mean."""
    text, timesteps, noise = [], [], []
    for caption in (block.owner == sample).nonzero().flatten().tolist():
        for timestep in range(0, TRAIN_TIMESTEPS, TRAIN_TIMESTEPS // plan.timesteps):
            for draw in range(plan.draws):
                text.append(block.text[caption])
                timesteps.append(timestep)
                one_noise = gaussian_noise(
                    stream_key(plan.seed, "training samples"),
                    block.train_ids[sample : sample + 1],
                    torch.tensor([timestep]),
                    torch.tensor([draw]),
                    model.latent_shape,
                    captions=int(block.caption_number[caption]),
                )
                noise.append(one_noise[0])
    clean = block.latents[sample].expand(len(noise), *model.latent_shape)
    return squared_residual(model, unet, clean, torch.stack(text), torch.tensor(timesteps), torch.stack(noise)).mean()


def all_losses(
    model: DiffusionModel, unet: Callable[..., tuple[Tensor, ...]], plan: NoisePlan, block: SampleBlock
) -> Tensor:
    return torch.stack([one_loss(model, unet, plan, block, sample) for sample in range(len(block.train_ids))])


def take(block: SampleBlock, samples: list[int]) -> SampleBlock:
    """A block of some samples of another, in this order."""
    captions = [(c, row) for row, s in enumerate(samples) for c in (block.owner == s).nonzero().flatten().tolist()]
    rows = [caption for caption, _ in captions]
    owner = torch.tensor([row for _, row in captions])
    numbers = block.caption_number[rows]
    return SampleBlock(block.train_ids[samples], block.latents[samples], block.text[rows], owner, numbers)


@torch.no_grad()
def test_losses_equal_a_plain_loop_in_float64(tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock) -> None:
    expected = all_losses(tiny_model, double_unet(tiny_model), plan, block)
    found = training_losses(tiny_model, plan, block, micro_batch=24)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("micro_batch", [1, 16, 1000])
def test_loss_and_score_are_the_same_alone_in_any_batch_and_in_any_order(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, updates: dict[str, Tensor], micro_batch: int
) -> None:
    losses = training_losses(tiny_model, plan, block, micro_batch=24)
    scores = first_order_scores(tiny_model, plan, block, updates, micro_batch=24)
    rounding = 1e-5 * scores.abs().max().item()
    for samples in ([6, 2, 0, 5, 1, 4, 3], [4, 2], [0], [3], [6]):
        part = take(block, samples)
        torch.testing.assert_close(
            training_losses(tiny_model, plan, part, micro_batch), losses[samples], rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            first_order_scores(tiny_model, plan, part, updates, micro_batch), scores[:, samples], rtol=0, atol=rounding
        )


def test_changing_a_caption_changes_the_loss_of_its_own_sample_only(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock
) -> None:
    losses = training_losses(tiny_model, plan, block, micro_batch=24)
    other = block.text.clone()
    other[1] = block.text[2]
    changed = training_losses(tiny_model, plan, replace(block, text=other), micro_batch=24)
    # Only sample 0 owns caption 1.
    assert changed[0] != losses[0]
    torch.testing.assert_close(changed[1:], losses[1:], rtol=1e-6, atol=0)


def test_first_order_scores_equal_the_derivative_along_each_update(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, updates: dict[str, Tensor]
) -> None:
    found = first_order_scores(tiny_model, plan, block, updates, micro_batch=24)
    assert found.shape == (3, len(block.train_ids))
    unet = double_unet(tiny_model)
    weights = {f"{name}.weight": unet.get_submodule(name).weight.detach() for name in updates}

    def losses(moving: dict[str, Tensor]) -> Tensor:
        def call(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
            return torch.func.functional_call(unet, moving, args, kwargs)

        return all_losses(tiny_model, call, plan, block)

    for query, scores in enumerate(found):
        tangent = {f"{name}.weight": update[query].double() for name, update in updates.items()}
        derivative = torch.func.jvp(losses, (weights,), (tangent,))[1]
        torch.testing.assert_close(scores, derivative, rtol=0, atol=1e-4 * derivative.norm().item())
        step = 1e-5
        with torch.no_grad():
            ahead, behind = (
                losses({name: weight + sign * step * tangent[name] for name, weight in weights.items()})
                for sign in (1, -1)
            )
        central = (ahead - behind) / (2 * step)
        torch.testing.assert_close(scores, central, rtol=0, atol=1e-4 * central.norm().item())


def test_exact_scores_are_the_rise_of_the_loss_in_float64(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, updates: dict[str, Tensor]
) -> None:
    """A large step, where the first order no longer holds."""
    update = {name: change[0] for name, change in updates.items()}
    base = training_losses(tiny_model, plan, block, micro_batch=24)
    found = exact_scores(tiny_model, plan, block, base, update, micro_batch=24)
    unet = double_unet(tiny_model)
    with torch.no_grad():
        before = all_losses(tiny_model, unet, plan, block)
        for name, change in update.items():
            unet.get_submodule(name).weight += change.double()
        expected = all_losses(tiny_model, unet, plan, block) - before
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.norm().item())


@pytest.fixture(scope="module")
def planted(model_folder: Path) -> tuple[DiffusionModel, SampleBlock, EkfacFisher]:
    """A model, a block and the Fisher of its samples' gradients."""
    model = load_model(model_folder, torch.device("cpu"))
    block = make_block(model)
    draws = 40
    rows = torch.arange(len(block.owner)).repeat_interleave(draws)
    generator = torch.Generator().manual_seed(3)
    timesteps = torch.randint(TRAIN_TIMESTEPS, (len(rows),), generator=generator)
    noise = torch.randn(len(rows), *model.latent_shape, generator=generator)
    dataset = TensorDataset(block.latents[block.owner[rows]], block.text[rows], timesteps, noise)

    def loss(unet: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return per_sample_loss(unet, model.scheduler, *batch).sum()

    names = list(cross_attention_kv_layers(model.unet))
    return model, block, fit_ekfac(model.unet, names, dataset, loss, 64, torch.device("cpu"))


def updates_of_the_samples(
    planted: tuple[DiffusionModel, SampleBlock, EkfacFisher], alpha: float
) -> list[dict[str, Tensor]]:
    """The unlearning update of each sample taken as the query."""
    model, block, fisher = planted
    updates = []
    for sample in range(len(block.train_ids)):
        first_caption = int((block.owner == sample).nonzero()[0])
        gradient = query_gradient(
            model, block.latents[sample], block.text[first_caption], owner=sample, seed=9, pairs=200, micro_batch=100
        )
        updates.append(unlearning_update(fisher, gradient, alpha=alpha, training_size=10))
    return updates


def test_a_training_sample_is_the_most_influential_on_itself(
    planted: tuple[DiffusionModel, SampleBlock, EkfacFisher],
) -> None:
    model, block, _ = planted
    updates = updates_of_the_samples(planted, alpha=1e-4)
    stacked = {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
    plan = NoisePlan(seed=5, timesteps=20, draws=2)
    first_order = first_order_scores(model, plan, block, stacked, micro_batch=80)
    base = training_losses(model, plan, block, micro_batch=80)
    exact = torch.stack([exact_scores(model, plan, block, base, update, micro_batch=80) for update in updates])

    for scores in (first_order, exact):
        assert (scores.diagonal() > 0).all()
        first = scores.argmax(1) == torch.arange(len(updates))
        assert first.double().mean() >= 0.95
    for ours, theirs in zip(first_order, exact, strict=True):
        assert spearmanr(ours, theirs).statistic > 0.95


def test_update_solves_the_damped_fisher_and_scales_with_alpha_over_n(
    planted: tuple[DiffusionModel, SampleBlock, EkfacFisher],
) -> None:
    _, _, fisher = planted
    generator = torch.Generator().manual_seed(4)
    gradient = {
        name: torch.randn(len(f.output_basis), len(f.input_basis), generator=generator)
        for name, f in fisher.layers.items()
    }
    update = unlearning_update(fisher, gradient, alpha=0.01, training_size=500)
    assert update.keys() == gradient.keys()
    for name, factors in fisher.layers.items():
        basis = torch.kron(factors.output_basis.double(), factors.input_basis.double())
        damped = factors.eigenvalues.double().flatten() + 0.1 * factors.eigenvalues.double().mean()
        matrix = basis @ torch.diag(damped) @ basis.T
        expected = torch.linalg.solve(matrix, gradient[name].double().flatten()) * 0.01 / 500
        error = (update[name].double().flatten() - expected).norm() / expected.norm()
        assert error < 1e-4


def test_query_gradient_is_the_mean_weight_gradient_over_its_stratified_pairs(
    tiny_model: DiffusionModel, block: SampleBlock
) -> None:
    pairs, owner, seed = 23, 2**35 + 1, 6
    found = query_gradient(
        tiny_model, block.latents[0], block.text[0], owner=owner, seed=seed, pairs=pairs, micro_batch=10
    )

    # t_i is uniform in the i-th of `pairs` equal parts of [0, T).
    offsets = uniform(stream_key(seed, "query timesteps"), owner, pairs).tolist()
    timesteps = torch.tensor([int((i + offset) / pairs * TRAIN_TIMESTEPS) for i, offset in enumerate(offsets)])
    parts = (timesteps + 1) * pairs / TRAIN_TIMESTEPS > torch.arange(pairs)
    assert parts.all()
    unet = double_unet(tiny_model).requires_grad_(True)
    losses = []
    for number, timestep in enumerate(timesteps):
        noise = gaussian_noise(
            stream_key(seed, "query noise"),
            torch.tensor([owner]),
            timestep[None],
            torch.tensor([number]),
            tiny_model.latent_shape,
        )
        losses.append(squared_residual(tiny_model, unet, block.latents[:1], block.text[:1], timestep[None], noise))
    layers = cross_attention_kv_layers(unet)
    expected = torch.autograd.grad(torch.cat(losses).mean(), [layer.weight for layer in layers.values()])

    assert found.keys() == layers.keys()
    for name, gradient in zip(layers, expected, strict=True):
        assert (found[name].double() - gradient).norm() < 1e-4 * gradient.norm()


def test_query_gradient_does_not_depend_on_the_micro_batch(tiny_model: DiffusionModel, block: SampleBlock) -> None:
    whole, parts = (
        query_gradient(tiny_model, block.latents[0], block.text[0], owner=1, seed=0, pairs=20, micro_batch=size)
        for size in (20, 3)
    )
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() < 1e-5 * gradient.norm()


def snapshot(model: DiffusionModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}


def test_moved_weights_come_back_exactly(tiny_model: DiffusionModel, updates: dict[str, Tensor]) -> None:
    before = snapshot(tiny_model)
    update = {name: change[0] for name, change in updates.items()}
    with moved(tiny_model, update):
        for name, tensor in tiny_model.unet.state_dict().items():
            change = update.get(name.removesuffix(".weight"), torch.zeros(()))
            assert torch.equal(tensor, before[name] + change)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.unet.state_dict().items())


def test_moved_weights_come_back_exactly_after_a_failure(
    tiny_model: DiffusionModel, updates: dict[str, Tensor]
) -> None:
    before = snapshot(tiny_model)
    with pytest.raises(KeyboardInterrupt), moved(tiny_model, {name: change[0] for name, change in updates.items()}):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.unet.state_dict().items())


@pytest.mark.parametrize("micro_batch", [8, 1000])
def test_a_loss_that_is_not_finite_names_sample_and_timestep(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, updates: dict[str, Tensor], micro_batch: int
) -> None:
    latents = block.latents.clone()
    latents[4, 0, 0, 0] = torch.nan
    broken = replace(block, latents=latents)
    message = rf"sample {block.train_ids[4]} at timestep 0 is nan"
    with pytest.raises(FloatingPointError, match=message):
        training_losses(tiny_model, plan, broken, micro_batch)
    with pytest.raises(FloatingPointError, match=message):
        first_order_scores(tiny_model, plan, broken, updates, micro_batch)
    with pytest.raises(FloatingPointError, match=r"sample 77 at timestep \d+ is nan"):
        query_gradient(tiny_model, latents[4], block.text[0], owner=77, seed=0, pairs=4, micro_batch=4)


def test_scoring_leaves_weights_and_hooks_as_they_were(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, updates: dict[str, Tensor]
) -> None:
    before = snapshot(tiny_model)
    losses = training_losses(tiny_model, plan, block, micro_batch=24)
    first_order_scores(tiny_model, plan, block, updates, micro_batch=24)
    exact_scores(tiny_model, plan, block, losses, {name: change[0] for name, change in updates.items()}, 24)
    assert torch.equal(training_losses(tiny_model, plan, block, micro_batch=24), losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.unet.state_dict().items())
    assert not any(layer._forward_hooks for layer in cross_attention_kv_layers(tiny_model.unet).values())
