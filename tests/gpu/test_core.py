"""The card against the CPU: noise, losses, gradients, Fisher, scores, sketches and images are the same on both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import EkfacFisher, FisherKind, fit_fisher
from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stream_key
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.diffusion.sampling import generate
from fastgda_core.ranking.query_tower import TowerMoments
from fastgda_core.sketches.eigen import EigenSketch, sample_moments
from fastgda_core.sketches.factored import FactoredSketch, caption_inputs
from fastgda_core.sketches.principal import PrincipalSketch
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import sample_gradients
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import query_gradients, unlearning_update
from tests.fastgda_core.blocks import (
    CAPTIONS,
    fisher_rows,
    make_block,
    many_samples,
    random_updates,
    stack,
    summed_loss,
)

pytestmark = pytest.mark.gpu

PLAN = NoisePlan(seed=5, timesteps=4, draws=2)
LAYERS = "cross-attn-kv"


def on(device: torch.device, block: SampleBlock) -> SampleBlock:
    """The same samples on a device."""
    return SampleBlock(
        block.train_ids.to(device),
        block.latents.to(device),
        {name: rows.to(device) for name, rows in block.condition.items()},
        block.owner.to(device),
        block.caption_number.to(device),
    )


def moved(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def layers_of(model: DiffusionModel) -> dict[str, Layer]:
    return select_layers(model.denoiser, LAYERS)


def first_order(
    model: DiffusionModel, block: SampleBlock, updates: dict[str, Tensor], rows: int = 64, plan: NoisePlan = PLAN
) -> Tensor:
    found = first_order_scores(
        model, layers_of(model), plan, on(model.device, block), [moved(model.device, updates)], MicroBatch(rows)
    )
    return found.cpu()


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return ((found.cpu().double() - expected.cpu().double()).norm() / expected.double().norm()).item()


@pytest.fixture
def block(tiny_model: DiffusionModel) -> SampleBlock:
    return make_block(tiny_model, flips=True)


@pytest.fixture
def updates(tiny_model: DiffusionModel) -> dict[str, Tensor]:
    return random_updates(layers_of(tiny_model))


def fitted(model: DiffusionModel, kind: FisherKind) -> object:
    block = on(torch.device("cpu"), make_block(model))
    names = list(layers_of(model))
    return fit_fisher(
        kind, model.denoiser, names, TensorDataset(*fisher_rows(model, block)), summed_loss(model), 64, model.device
    )


def test_noise_is_the_same(card: torch.device) -> None:
    owners, timesteps, draws = torch.tensor([0, 7, 2**33 + 3]), torch.tensor([0, 9, 99]), torch.tensor([0, 1, 5])
    key = stream_key(3, "training samples")
    here = gaussian_noise(key, owners, timesteps, draws, (4, 31, 33))
    there = gaussian_noise(key, owners.to(card), timesteps.to(card), draws.to(card), (4, 31, 33))
    assert there.device.type == card.type
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=2e-6)


def test_captions_are_encoded_the_same(tiny_model: DiffusionModel, card_model: DiffusionModel) -> None:
    here, there = (model.encode_captions(list(CAPTIONS)) for model in (tiny_model, card_model))
    assert relative(there["encoder_hidden_states"], here["encoder_hidden_states"]) < 1e-5


def test_generated_images_are_the_same(tiny_model: DiffusionModel, card_model: DiffusionModel) -> None:
    images = []
    for model in (tiny_model, card_model):
        latents = generate(model, list(CAPTIONS[:3]), [0, 1, 5], seed=4, steps=5, guidance_scale=2.0)
        images.append(np.stack([np.asarray(image, dtype=int) for image in model.decode_images(latents)]))
        assert model.encode_images(model.decode_images(latents)).device.type == model.device.type
    assert np.abs(images[0] - images[1]).max() <= 1  # of 255


@pytest.mark.parametrize("objective", list(Objective))
def test_losses_are_the_same(
    tiny_model: DiffusionModel, card_model: DiffusionModel, block: SampleBlock, objective: Objective
) -> None:
    here, there = (
        training_losses(model.with_objective(objective), PLAN, on(model.device, block), MicroBatch(64))
        for model in (tiny_model, card_model)
    )
    assert relative(there, here) < 1e-5


# Against float64 on the CPU. The noise is float32 whatever the precision, and its last digit is each device's own.
@pytest.mark.parametrize(
    ("precision", "most"),
    [(Precision.float64, 1e-6), (Precision.float32, 1e-4), (Precision.tf32, 1e-2), (Precision.bf16, 5e-2)],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_first_order_scores_are_those_of_the_cpu_in_float64(
    tiny_model: DiffusionModel, card_model: DiffusionModel, precision: Precision, most: float, compiled: bool
) -> None:
    if precision is Precision.tf32 and card_model.device.type != "cuda":
        pytest.skip("a CPU has no tf32")
    samples, asked = many_samples(tiny_model, 48), random_updates(layers_of(tiny_model), queries=6)
    model = card_model.in_precision(precision)
    fine = first_order(tiny_model.in_precision(Precision.float64), samples, asked)
    found = first_order(model.compiled() if compiled else model, samples, asked)
    assert relative(found, fine) < most
    assert min(spearmanr(*pair).statistic for pair in zip(found, fine, strict=True)) > 1 - most


def test_first_order_scores_do_not_depend_on_the_micro_batch(
    card_model: DiffusionModel, block: SampleBlock, updates: dict[str, Tensor]
) -> None:
    whole = first_order(card_model, block, updates, 1000)
    assert relative(first_order(card_model, block, updates, 7), whole) < 1e-5


def test_exact_scores_are_those_of_the_cpu_in_float64(
    tiny_model: DiffusionModel, card_model: DiffusionModel, block: SampleBlock, updates: dict[str, Tensor]
) -> None:
    def exact(model: DiffusionModel) -> Tensor:
        mine, update = on(model.device, block), {name: change[0].to(model.device) for name, change in updates.items()}
        base = training_losses(model, PLAN, mine, MicroBatch(64))
        return exact_scores(model, layers_of(model), PLAN, mine, base, update, MicroBatch(64))

    expected = exact(tiny_model.in_precision(Precision.float64))
    assert relative(exact(card_model.in_precision(Precision.float64)), expected) < 1e-6
    assert relative(exact(card_model), expected) < 1e-3


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_a_fisher_fitted_there_solves_as_one_fitted_here(
    tiny_model: DiffusionModel, card_model: DiffusionModel, kind: FisherKind, updates: dict[str, Tensor]
) -> None:
    here, there = fitted(tiny_model, kind), fitted(card_model, kind)
    for name, changes in updates.items():
        for change in changes:
            found = there.solve(name, change.to(card_model.device))  # type: ignore[attr-defined]
            assert relative(found, here.solve(name, change)) < 1e-3  # type: ignore[attr-defined]


def test_query_gradients_are_the_same_in_groups(
    tiny_model: DiffusionModel, card_model: DiffusionModel, block: SampleBlock
) -> None:
    found = []
    for model in (tiny_model, card_model):
        mine = on(model.device, block)
        condition = {name: rows[:1] for name, rows in mine.condition.items()}
        one = query_gradients(
            model,
            layers_of(model),
            mine.latents[0, 0],
            condition,
            owner=3,
            seed=9,
            pairs=12,
            groups=4,
            micro_batch=MicroBatch(5),
        )
        found.append(one)
    for name, gradient in found[0].items():
        assert gradient.shape[0] == 4 and relative(found[1][name], gradient) < 1e-4


def test_sketches_made_there_give_the_scores(card_model: DiffusionModel, block: SampleBlock) -> None:
    """Principal and factored, all coordinates and directions: inner products are the first-order scores."""
    fisher = fitted(card_model, "ekfac")
    assert isinstance(fisher, EkfacFisher)
    mine, layers = on(card_model.device, block), layers_of(card_model)
    (gradients,) = sample_gradients(card_model, layers, PLAN, mine, MicroBatch(24))
    queries = [
        {name: gradients.of(name)[row].view(layer.weight.shape) for name, layer in layers.items()}
        for row in range(gradients.count)
    ]
    steps = stack([unlearning_update(fisher, query, alpha=1.0, training_size=1) for query in queries])
    expected = first_order(card_model, block, steps)
    moments = sample_moments(fisher, [gradients])
    eigen = EigenSketch.of_most_energy(fisher, moments, moments, 10**9)
    sketch = PrincipalSketch.of_samples_like(eigen, eigen.of_samples(gradients).flatten(0, 1), 10**9)
    asked, kept = torch.stack([sketch.of_query(query) for query in queries]), sketch.of_samples(gradients)
    assert relative(torch.einsum("qk,nfk->qnf", asked.double(), kept.double()).amax(2), expected) < 1e-4
    inputs = caption_inputs(card_model, layers, mine.condition, MicroBatch(3))
    factored = FactoredSketch.of_samples(gradients)
    assert relative(factored.scores(inputs, [moved(card_model.device, steps)]), expected) < 1e-5


def test_a_query_tower_solved_and_folded_there_predicts_the_same_sketches(
    tiny_model: DiffusionModel, card_model: DiffusionModel, block: SampleBlock
) -> None:
    features = torch.randn(len(block.train_ids), 5, generator=torch.Generator().manual_seed(2))
    phi = torch.nn.functional.normalize(features, dim=1)
    fisher, found = fitted(tiny_model, "ekfac"), []
    assert isinstance(fisher, EkfacFisher)
    (here,) = sample_gradients(tiny_model, layers_of(tiny_model), PLAN, block, MicroBatch(24))
    squares = sample_moments(fisher, [here])
    eigen = EigenSketch.of_most_energy(fisher, squares, squares, 3000)
    sketch = PrincipalSketch.of_samples_like(eigen, eigen.of_samples(here).flatten(0, 1), 6)
    tensors = {**eigen.tensors(), "directions": sketch.directions, "directions_energy": sketch.energy_kept}
    for model in (tiny_model, card_model):
        layers, mine, seen = layers_of(model), on(model.device, block), phi.to(model.device)
        (gradients,) = sample_gradients(model, layers, PLAN, mine, MicroBatch(24))
        moments = TowerMoments()
        moments.add(gradients, seen)
        there = fisher.to(model.device)
        assert isinstance(there, EkfacFisher)
        tower = moments.tower(0.03, PrincipalSketch.load(tensors, there), 5, energy=1.0)
        inputs = caption_inputs(model, layers, mine.condition, MicroBatch(24))
        found.append(tower.sketches(inputs, seen[mine.owner]).cpu())
    assert relative(found[1], found[0]) < 1e-3


def test_memory_that_runs_out_halves_the_micro_batch(
    card_model: DiffusionModel, updates: dict[str, Tensor], tiny_model: DiffusionModel
) -> None:
    if card_model.device.type != "cuda":
        pytest.skip("a CPU's memory does not run out")
    samples, plan = many_samples(tiny_model, 400), replace(PLAN, timesteps=20)
    expected = first_order(card_model, samples, updates, 512, plan)
    batch = MicroBatch(16_000)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(300 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    try:
        block, asked = on(card_model.device, samples), moved(card_model.device, updates)
        found = first_order_scores(card_model, layers_of(card_model), plan, block, [asked], batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert batch.size < 16_000
    assert relative(found, expected) < 1e-5
