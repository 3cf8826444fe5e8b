"""The query tower against a regression that is written out token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import UsageError
from fastgda_core.ranking.query_tower import TowerMoments
from fastgda_core.sketches.factored import caption_inputs
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


def test_a_tower_is_the_ridge_regression_of_output_gradients(
    tiny_model: DiffusionModel, layers: dict[str, Layer], block: SampleBlock, gradients: SampleGradients, phi: Tensor
) -> None:
    moments = TowerMoments()
    moments.add(gradients, phi)
    tower = moments.tower(RIDGE)
    captions = block.captions_of()
    inputs = caption_inputs(tiny_model, layers, block.condition, MicroBatch(24))
    found = tower.gradients({name: inputs[name] for name in set(tower.seen_by.values())}, phi[block.owner])
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
        expected = np.einsum("cpo,cpi->coi", predicted, inputs[name].double().numpy())
        assert np.linalg.norm(found[name].numpy() - expected) < 2e-3 * np.linalg.norm(expected)


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
