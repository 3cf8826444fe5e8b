"""Gradient features, held against explicit per-sample gradients by autograd in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.loss import take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stream_key
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.sketches.projection import Projection
from fastgda_core.teachers.kernel import KERNEL_TEACHERS, journey_gradient
from fastgda_core.teachers.kernels import DualKernel
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.training_loss import SampleBlock
from tests.fastgda_core.blocks import Denoiser, double_denoiser, make_block, pick, plain_loss, squared_residual

PLAN = NoisePlan(seed=5, timesteps=4, draws=2)
WHOLE = 10**9  # more numbers than weights: nothing is lost


@pytest.fixture
def exact(tiny_model: DiffusionModel) -> DiffusionModel:
    return tiny_model.in_precision(Precision.float64)


def projection_of(layers: dict[str, Layer], size: int = WHOLE) -> Projection:
    sizes = {
        name: layer.weight.numel() + (layer.bias is not None) * len(layer.weight) for name, layer in layers.items()
    }
    return Projection.drawn(sizes, size, 0, torch.device("cpu"))


def features(
    name: str, model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer], size: int = WHOLE
) -> Tensor:
    method = KERNEL_TEACHERS[name]
    model = model.with_objective(method.objective)
    return method.of_samples(model, layers, PLAN, block, projection_of(layers, size), MicroBatch(5))


def flat_gradient(denoiser: torch.nn.Module, loss: Tensor, layers: dict[str, Layer]) -> Tensor:
    """The gradient at the layers' weights and biases, layer by layer, each (d_out, d_in) with its bias last."""
    mine = [denoiser.get_submodule(name) for name in layers]
    wanted = [parameter for layer in mine for parameter in (layer.weight, layer.bias) if parameter is not None]
    found = iter(torch.autograd.grad(loss, wanted))
    pieces = []
    for layer in mine:
        matrix = next(found).flatten(1)
        pieces.append(matrix if layer.bias is None else torch.cat([matrix, next(found)[:, None]], dim=1))
    return torch.cat([each.flatten() for each in pieces])


def naive(model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer], plan: NoisePlan, norm: bool) -> Tensor:
    """The gradient of every sample, (n, weights): autograd sample by sample."""
    denoiser = double_denoiser(model).requires_grad_(True)
    noises: list[Tensor] = []

    def without_target(noisy: Tensor, *rest: object, **options: object) -> tuple[Tensor, ...]:
        # The loss is of noise - output: an output with the noise taken off leaves the norm.
        return (denoiser(noisy, *rest, **options)[0] + noises.pop(),)

    found = []
    for sample in range(len(block.train_ids)):
        called: Denoiser = denoiser
        if norm:
            noises.append(all_noise(model, block, plan, sample))
            called = without_target
        found.append(flat_gradient(denoiser, plain_loss(model, called, plan, block, sample), layers))
    return torch.stack(found)


def all_noise(model: DiffusionModel, block: SampleBlock, plan: NoisePlan, sample: int) -> Tensor:
    """The noise that `plain_loss` draws for a sample, in its order."""
    seen: list[Tensor] = []

    def listen(noisy: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
        seen.append(noisy)
        return (torch.zeros_like(noisy),)

    silent = replace(block, latents=torch.zeros_like(block.latents))
    plain_loss(model, listen, plan, silent, sample)
    captions = (block.owner == sample).sum().item()
    alpha_bar = model.schedule.scheduler.alphas_cumprod.double()
    timesteps = torch.arange(0, 100, 25).repeat_interleave(plan.draws).repeat(int(captions))
    return seen[0] / (1 - alpha_bar[timesteps]).sqrt()[:, None, None, None]


@pytest.mark.parametrize("name", ["trak", "d_trak"])
@pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
def test_features_are_the_gradients_of_autograd(exact: DiffusionModel, name: str, selection: str) -> None:
    block, layers = pick(make_block(exact), [0, 3, 6]), select_layers(exact.denoiser, selection)
    found = features(name, exact, block, layers)[:, 0]
    expected = naive(exact, block, layers, PLAN, norm=KERNEL_TEACHERS[name].objective is Objective.output_norm)
    parts = expected.split([int(slots.numel()) for slots in projection_of(layers).slots.values()], dim=1)
    projected = projection_of(layers).of(zip(layers, parts, strict=True))
    torch.testing.assert_close(found, projected, rtol=1e-6, atol=1e-6 * float(projected.abs().max()))
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=1e-6, atol=1e-9)


def test_trak_is_the_dense_formula(exact: DiffusionModel, layers: dict[str, Layer]) -> None:
    block, layers = make_block(exact), select_layers(exact.denoiser, "cross-attn-kv")
    gradients = naive(exact, block, layers, PLAN, norm=False)
    small, ridge = Projection.drawn({"all": gradients.shape[1]}, 60, 3, torch.device("cpu")), 1e-4
    phi = small.of([("all", gradients)])
    expected = phi[:2] @ torch.linalg.inv(phi.T @ phi + ridge * torch.eye(60, dtype=torch.float64)) @ phi.T
    found = KERNEL_TEACHERS["trak"].scores(DualKernel(phi, ridge).of(phi[:2]), phi[:, None])
    torch.testing.assert_close(found, expected)


def test_dmin_is_the_mean_over_timesteps_of_cosines(exact: DiffusionModel) -> None:
    block, layers = make_block(exact), select_layers(exact.denoiser, "cross-attn-kv")
    found = features("dmin", exact, block, layers)
    cosines = []
    for timestep in (0, 25, 50, 75):
        here = naive(exact, block, layers, replace(PLAN, timesteps=(timestep,)), norm=False)
        here = here / here.norm(dim=1, keepdim=True)
        cosines.append(here @ here.T)
    scores = KERNEL_TEACHERS["dmin"].scores(found[:, 0], found)
    torch.testing.assert_close(scores, torch.stack(cosines).mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores.diagonal(), torch.ones(len(block.train_ids), dtype=torch.float64))


@pytest.mark.parametrize("name", ["trak", "dmin"])
def test_a_feature_is_the_same_alone_and_in_any_batch(tiny_model: DiffusionModel, name: str) -> None:
    block, layers = make_block(tiny_model), select_layers(tiny_model.denoiser, "cross-attn-kv")
    whole = features(name, tiny_model, block, layers, size=256)
    for sample in (0, 3, 5):
        alone = features(name, tiny_model, pick(block, [sample]), layers, size=256)
        torch.testing.assert_close(alone[0], whole[sample], rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_of_two_mirrored_images_the_larger_score_counts(exact: DiffusionModel) -> None:
    block, layers = make_block(exact, flips=True), select_layers(exact.denoiser, "cross-attn-kv")
    found = features("trak", exact, block, layers)
    plain = features("trak", exact, make_block(exact), layers)
    assert found.shape[1] == 2
    torch.testing.assert_close(found[:, :1], plain)
    each = torch.einsum("qd,nfd->qnf", plain[:, 0], found)
    torch.testing.assert_close(KERNEL_TEACHERS["trak"].scores(plain[:, 0], found), each.amax(2))


def test_a_journeys_gradient_is_that_of_the_losses_along_it(exact: DiffusionModel) -> None:
    layers, generator = select_layers(exact.denoiser, "cross-attn-kv"), torch.Generator().manual_seed(3)
    clean = torch.randn(3, *exact.latent_shape, generator=generator)
    timesteps, condition = torch.tensor([80, 40, 3]), take(make_block(exact).condition, slice(1))
    found = journey_gradient(
        exact, layers, clean, timesteps, condition, owner=77, seed=2, pairs=5, micro_batch=MicroBatch(4)
    )
    denoiser, rows = double_denoiser(exact).requires_grad_(True), torch.arange(6)
    at, owner = timesteps.repeat_interleave(2), torch.full((6,), 77)
    noise = gaussian_noise(stream_key(2, "journey noise"), owner, at, rows, exact.latent_shape)
    text = condition["encoder_hidden_states"].expand(6, -1, -1)
    loss = squared_residual(exact, denoiser, clean.repeat_interleave(2, 0), text, at, noise).mean()
    expected = flat_gradient(denoiser, loss, layers)
    torch.testing.assert_close(torch.cat([each.flatten() for each in found.values()]), expected, rtol=1e-6, atol=1e-10)


def test_a_ridge_is_in_the_units_of_projections_that_grow_with_their_dimensions() -> None:
    method = KERNEL_TEACHERS["d_trak"]
    assert method.lambda_of(None, 32_768) == 500 / 32_768 and method.lambda_of(64.0, 32) == 2.0


def test_rounded_precisions_are_refused() -> None:
    for method in KERNEL_TEACHERS.values():
        method.check_precision(Precision.float64)
        with pytest.raises(UsageError, match="features are made in float32"):
            method.check_precision(Precision.bf16)
