"""The query tower against a regression that is written out token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher, Fisher, LayerFactors
from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import UsageError
from fastgda_core.ranking.query_tower import TowerMoments
from fastgda_core.sketches.eigen import EigenSketch, sample_moments
from fastgda_core.sketches.factored import caption_inputs
from fastgda_core.sketches.principal import PrincipalSketch
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import SampleGradients, sample_gradients
from fastgda_core.teachers.training_loss import SampleBlock
from tests.fastgda_core.blocks import make_block

RIDGE = 0.03


@pytest.fixture(params=["one image", "mirrored"])
def block(request: pytest.FixtureRequest, tiny_model: DiffusionModel) -> SampleBlock:
    return make_block(tiny_model, flips=request.param == "mirrored")


@pytest.fixture
def gradients(
    tiny_model: DiffusionModel, layers: dict[str, Layer], plan: NoisePlan, block: SampleBlock
) -> SampleGradients:
    (found,) = sample_gradients(tiny_model, layers, plan, block, MicroBatch(24))
    return found


@pytest.fixture
def phi(block: SampleBlock) -> Tensor:
    return torch.nn.functional.normalize(
        torch.randn(len(block.train_ids), 5, generator=torch.Generator().manual_seed(2)), dim=1
    )


def token_rows(inputs: Tensor, features: Tensor) -> np.ndarray:
    """One row a token: its input, its place, the mean input of its caption, the features, 1."""
    rows = []
    for caption in range(len(inputs)):
        for token in range(inputs.shape[1]):
            place = np.eye(inputs.shape[1])[token]
            mean = inputs[caption].double().mean(0).numpy()
            own = inputs[caption, token].double().numpy()
            rows.append(np.concatenate([own, place, mean, features[caption].double().numpy(), [1.0]]))
    return np.stack(rows)


def predicted_by_hand(
    layers: dict[str, Layer], block: SampleBlock, gradients: SampleGradients, inputs: dict[str, Tensor], phi: Tensor
) -> dict[str, np.ndarray]:
    """The gradients of the samples' captions by a regression that is written out, (captions, d_out, d_in) by layer."""
    captions = block.captions_of()
    found = {}
    for name in layers:
        rows = token_rows(inputs[name], phi[block.owner])
        share = captions[block.owner].double()[:, None, None]
        targets = (gradients.outputs[name][:: block.flips].double() * share).flatten(0, 1).numpy()
        # Least squares with the ridge as rows of its own.
        below = np.sqrt(RIDGE) * np.eye(rows.shape[1])
        weight, *_ = np.linalg.lstsq(
            np.concatenate([rows, below]), np.concatenate([targets, np.zeros((len(below), targets.shape[1]))])
        )
        predicted = (rows @ weight).reshape(len(block.owner), -1, targets.shape[1])
        found[name] = np.einsum("cpo,cpi->coi", predicted, inputs[name].double().numpy())
    return found


@pytest.fixture(params=["one basis of inputs", "a basis of its own each"])
def sketch(
    request: pytest.FixtureRequest,
    fishers: dict[str, Fisher],
    gradients: SampleGradients,
) -> PrincipalSketch:
    fisher = fishers["ekfac"]
    assert isinstance(fisher, EkfacFisher)
    if request.param == "a basis of its own each":
        draw = torch.Generator().manual_seed(3)

        def turned(factors: LayerFactors) -> LayerFactors:
            width = len(factors.input_basis)
            basis, _ = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))
            return replace(factors, input_basis=basis.to(factors.input_basis.dtype))

        fisher = replace(fisher, layers={name: turned(factors) for name, factors in fisher.layers.items()})
    moments = sample_moments(fisher, [gradients])
    eigen = EigenSketch.of_most_energy(fisher, moments, moments, 3000)
    return PrincipalSketch.of_samples_like(eigen, eigen.of_samples(gradients).flatten(0, 1), 6)


def test_a_tower_is_the_sketch_of_what_a_ridge_regression_predicts(
    tiny_model: DiffusionModel,
    layers: dict[str, Layer],
    block: SampleBlock,
    gradients: SampleGradients,
    phi: Tensor,
    sketch: PrincipalSketch,
) -> None:
    moments = TowerMoments()
    moments.add(gradients, phi)
    inputs = caption_inputs(tiny_model, layers, block.condition, MicroBatch(24))
    expected = torch.zeros(len(block.owner), 5, dtype=torch.float64)
    by_hand = predicted_by_hand(layers, block, gradients, inputs, phi)
    for name in layers:
        factors = sketch.eigen.fisher.layers[name]
        mine = (sketch.eigen.layer == sketch.eigen.names.index(name)).nonzero().flatten()
        turned = np.einsum(
            "oa,coi,ib->cab",
            factors.output_basis.double().numpy(),
            by_hand[name],
            factors.input_basis.double().numpy(),
        ).reshape(len(by_hand[name]), -1)
        scaled = torch.from_numpy(turned)[:, sketch.eigen.place[mine]] * sketch.eigen.scale[mine].double()
        expected += scaled @ sketch.directions[mine, :5].double()
    asked = phi[block.owner]
    whole = moments.tower(RIDGE, sketch, 5, energy=1.0)
    assert whole.size == 5
    assert (whole.sketches(inputs, asked) - expected).norm() < 2e-3 * expected.norm()
    # What is left out is as much of the squares as is said, twice: of directions, and then of coordinates.
    for energy in (0.9, 0.99):
        short = moments.tower(RIDGE, sketch, 5, energy=energy)
        lost = (short.sketches(inputs, asked) - expected).norm() / expected.norm()
        assert lost < (2 * (1 - energy)) ** 0.5 * 1.5
        for first, folded in short.layers.items():
            assert len(folded.places) < len(whole.layers[first].places) / 2


def test_moments_add_up_over_blocks_of_samples(
    tiny_model: DiffusionModel, layers: dict[str, Layer], plan: NoisePlan, block: SampleBlock, phi: Tensor
) -> None:
    whole, parts = TowerMoments(), TowerMoments()
    for mine, moments in ((slice(None), whole), (slice(0, 3), parts), (slice(3, None), parts)):
        for some in sample_gradients(tiny_model, layers, plan, block.samples(mine), MicroBatch(24)):
            moments.add(some, phi[mine])
    for name, products in whole.products.items():
        assert (parts.products[name] - products).norm() < 1e-5 * products.norm()
    for name, squares in whole.squares.items():
        assert (parts.squares[name] - squares).norm() < 1e-5 * squares.norm()


def test_a_layer_whose_input_moves_has_no_tower(gradients: SampleGradients, phi: Tensor) -> None:
    moving = replace(gradients, moving={"conv": torch.zeros(len(phi), 2, 2)})
    with pytest.raises(UsageError, match="layer conv changes with the timestep"):
        TowerMoments().add(moving, phi)
