from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher, Fisher
from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.loss import take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stream_key, uniform
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import (
    compress,
    expand,
    query_gradient,
    query_gradients,
    unlearning_update,
)
from tests.fastgda_core.blocks import (
    TRAIN_IDS,
    TRAIN_TIMESTEPS,
    double_denoiser,
    gradients_of_samples,
    pick,
    plain_loss,
    squared_residual,
    stack,
)


@pytest.mark.heavy
@pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
def test_query_gradient_is_the_mean_weight_gradient_over_its_stratified_pairs(
    tiny_model: DiffusionModel, block: SampleBlock, selection: str
) -> None:
    pairs, owner, seed = 23, 2**35 + 1, 6
    found = query_gradient(
        tiny_model,
        select_layers(tiny_model.denoiser, selection),
        block.latents[0, 0],
        take(block.condition, slice(0, 1)),
        owner=owner,
        seed=seed,
        pairs=pairs,
        micro_batch=MicroBatch(10),
    )

    # t_i is uniform in the i-th of `pairs` equal parts of [0, T).
    offsets = uniform(stream_key(seed, "query timesteps"), owner, pairs).tolist()
    timesteps = torch.tensor([int((i + offset) / pairs * TRAIN_TIMESTEPS) for i, offset in enumerate(offsets)])
    parts = (timesteps + 1) * pairs / TRAIN_TIMESTEPS > torch.arange(pairs)
    assert parts.all()
    denoiser = double_denoiser(tiny_model).requires_grad_(True)
    text = block.condition["encoder_hidden_states"][:1]
    losses = []
    for number, timestep in enumerate(timesteps):
        noise = gaussian_noise(
            stream_key(seed, "query noise"),
            torch.tensor([owner]),
            timestep[None],
            torch.tensor([number]),
            tiny_model.latent_shape,
        )
        losses.append(squared_residual(tiny_model, denoiser, block.latents[:1, 0], text, timestep[None], noise))
    torch.cat(losses).mean().backward()

    assert found.keys() == select_layers(denoiser, selection).keys()
    for name, gradient in found.items():
        layer = denoiser.get_submodule(name)
        expected = layer.weight.grad.flatten(1)
        if layer.bias is not None:
            expected = torch.cat([expected, layer.bias.grad[:, None]], dim=1)
        assert (gradient.double() - expected).norm() < 1e-4 * expected.norm()


def test_query_gradient_does_not_depend_on_the_micro_batch(
    tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer]
) -> None:
    condition = take(block.condition, slice(0, 1))
    whole, parts = (
        query_gradient(
            tiny_model,
            layers,
            block.latents[0, 0],
            condition,
            owner=1,
            seed=0,
            pairs=20,
            micro_batch=MicroBatch(size),
        )
        for size in (20, 3)
    )
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("size", [20, 3])
def test_groups_of_pairs_hold_every_so_manieth_pair(
    tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer], size: int
) -> None:
    def by_groups(groups: int) -> dict[str, Tensor]:
        condition, micro_batch = take(block.condition, slice(0, 1)), MicroBatch(size)
        latent = block.latents[0, 0]
        return query_gradients(
            tiny_model, layers, latent, condition, owner=1, seed=0, pairs=20, groups=groups, micro_batch=micro_batch
        )

    alone, grouped = by_groups(20), by_groups(4)
    for name, pairs in alone.items():
        expected = torch.stack([pairs[group::4].double().mean(0) for group in range(4)])
        assert (grouped[name] - expected).norm() < 1e-5 * expected.norm()
    with pytest.raises(ValueError, match="20 pairs cannot be split into 3 groups"):
        by_groups(3)


@pytest.mark.heavy
def test_update_solves_the_damped_fisher_and_scales_with_alpha_over_n(fishers: dict[str, Fisher]) -> None:
    fisher = fishers["ekfac"]
    assert isinstance(fisher, EkfacFisher)
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


@pytest.fixture
def forgetting(
    tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer], fishers: dict[str, Fisher]
) -> list[dict[str, Tensor]]:
    """The unlearning update of each sample taken as the query."""
    gradients = gradients_of_samples(tiny_model, layers, block, pairs=200)
    return [unlearning_update(fishers["ekfac"], gradient, alpha=1e-4, training_size=10) for gradient in gradients]


@pytest.mark.integration
def test_a_training_sample_is_the_most_influential_on_itself(
    tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer], forgetting: list[dict[str, Tensor]]
) -> None:
    plan, size = NoisePlan(seed=5, timesteps=20, draws=2), MicroBatch(80)
    first_order = first_order_scores(tiny_model, layers, plan, block, [stack(forgetting)], size)
    base = training_losses(tiny_model, plan, block, size)
    exact = torch.stack([exact_scores(tiny_model, layers, plan, block, base, update, size) for update in forgetting])

    for scores in (first_order, exact):
        assert (scores.diagonal() > 0).all()
        first = scores.argmax(1) == torch.arange(len(forgetting))
        assert first.double().mean() >= 0.95
    for ours, theirs in zip(first_order, exact, strict=True):
        assert spearmanr(ours, theirs).statistic > 0.95


@pytest.mark.heavy
def test_copies_of_a_training_sample_rank_above_all_others_when_it_is_the_query(
    tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer], forgetting: list[dict[str, Tensor]]
) -> None:
    """Four copies of each sample, with ids, hence noise, of their own."""
    copies, samples = 4, len(TRAIN_IDS)
    crowd = pick(block, [sample for sample in range(samples) for _ in range(copies)])
    crowd = replace(crowd, train_ids=torch.arange(samples * copies) + 500)
    plan = NoisePlan(seed=5, timesteps=20, draws=2)
    scores = first_order_scores(tiny_model, layers, plan, crowd, [stack(forgetting)], MicroBatch(200))
    top = scores.topk(copies, dim=1).indices // copies
    own = top == torch.arange(samples)[:, None]
    assert own.double().mean() >= 0.95


def random_update() -> dict[str, Tensor]:
    """Layers whose singular values fall off, as those of gradients do; one is too small to be worth a factorisation."""
    generator = torch.Generator().manual_seed(1)
    update = {}
    for name, (rows, columns) in {"wide.to_k": (24, 40), "tall.to_v": (40, 20), "small": (3, 4)}.items():
        left, right = (torch.randn(size, min(rows, columns), generator=generator) for size in (rows, columns))
        update[name] = left * 0.6 ** torch.arange(min(rows, columns)) @ right.T
    return update


@pytest.mark.parametrize("rank", [1, 4, 11, 12])
def test_compressed_update_is_the_best_of_its_rank_and_says_its_error(rank: int) -> None:
    update = random_update()
    kept, error = compress(update, rank)
    back = expand(kept)
    assert back.keys() == update.keys()
    lost = total = best = 0.0
    for name, change in update.items():
        assert torch.linalg.matrix_rank(back[name]) <= max(rank, 3)
        lost += (back[name] - change).double().square().sum().item()
        total += change.double().square().sum().item()
        if f"{name}/left" in kept:
            best += torch.linalg.svdvals(change.double())[rank:].square().sum().item()
            assert kept[f"{name}/left"].numel() + kept[f"{name}/right"].numel() < change.numel()
        else:
            assert torch.equal(back[name], change)
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert error == pytest.approx((best / total) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("rank", [20, 24, 1000])
def test_compression_to_full_rank_is_exact(rank: int) -> None:
    update = random_update()
    kept, error = compress(update, rank)
    assert error == 0
    assert kept.keys() == update.keys()
    assert all(torch.equal(kept[name], change) for name, change in update.items())


def test_zero_update_has_no_error() -> None:
    assert compress({"layer": torch.zeros(30, 30)}, 2)[1] == 0


def test_stacked_queries_expand_as_each_alone() -> None:
    queries = [{name: change * scale for name, change in random_update().items()} for scale in (1.0, -2.0)]
    kept = [compress(query, 3)[0] for query in queries]
    together = expand(stack(kept))
    for number, one in enumerate(kept):
        for name, change in expand(one).items():
            torch.testing.assert_close(together[name][number], change)


@pytest.mark.heavy
def test_scores_of_a_low_rank_update_are_off_by_no_more_than_its_error(
    tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer], forgetting: list[dict[str, Tensor]]
) -> None:
    """|<g, Delta> - <g, Delta_r>| <= |g| |Delta - Delta_r|."""
    plan, size = NoisePlan(seed=5, timesteps=5, draws=1), MicroBatch(80)
    full = first_order_scores(tiny_model, layers, plan, block, [stack(forgetting)], size)
    gradient_norm = gradient_norms(tiny_model, plan, block, layers)
    errors = []
    for rank in (1, 2, 4):
        kept, error = zip(*(compress(update, rank) for update in forgetting), strict=True)
        low = first_order_scores(tiny_model, layers, plan, block, [expand(stack(list(kept)))], size)
        update_norm = torch.tensor([norm(update) for update in forgetting], dtype=torch.float64)
        bound = torch.tensor(error) * update_norm
        assert ((low - full).abs() <= 1.001 * bound[:, None] * gradient_norm[None] + 1e-6 * full.abs().max()).all()
        errors.append((low - full).norm().item())
    assert errors[0] > errors[1] > errors[2]


def norm(update: dict[str, Tensor]) -> float:
    return sum(change.double().square().sum().item() for change in update.values()) ** 0.5


def gradient_norms(model: DiffusionModel, plan: NoisePlan, block: SampleBlock, layers: dict[str, Layer]) -> Tensor:
    """|grad L(z_i)| over the layers by autograd through a plain loop, (n,)."""
    denoiser = double_denoiser(model).requires_grad_(True)
    weights = [denoiser.get_submodule(name).weight for name in layers]
    norms = []
    for sample in range(len(block.train_ids)):
        parts = torch.autograd.grad(plain_loss(model, denoiser, plan, block, sample), weights)
        norms.append(torch.cat([part.flatten() for part in parts]).norm())
    return torch.stack(norms)
