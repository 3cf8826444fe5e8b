from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgda_core.curvature.fisher import DiagonalFisher, EkfacFisher, Fisher
from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.teachers.gradients import steady_layers
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.registry import TEACHERS
from fastgda_core.teachers.scores import first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import unlearning_update
from tests.fastgda_core.blocks import (
    directional_derivative,
    gradients_of_samples,
    pick,
    plain_rise,
    random_updates,
    stack,
)

ALPHA, TRAINING_SIZE = 1e-3, 10


@pytest.fixture
def gradients(tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer]) -> list[dict[str, Tensor]]:
    """Of three queries."""
    return gradients_of_samples(tiny_model, layers, pick(block, [0, 3, 6]), pairs=30)


def updates_of(fisher: Fisher, gradients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [unlearning_update(fisher, gradient, alpha=ALPHA, training_size=TRAINING_SIZE) for gradient in gradients]


def dense_update(fisher: Fisher, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """(alpha / N) (F + 0.1 mean eigenvalue)^-1 gradient by a dense solve in float64."""
    update = {}
    for name, layer in gradient.items():
        if isinstance(fisher, DiagonalFisher):
            matrix = np.diag(fisher.layers[name].double().numpy().ravel())
        else:
            assert isinstance(fisher, EkfacFisher)
            factors = fisher.layers[name]
            basis = np.kron(factors.output_basis.double().numpy(), factors.input_basis.double().numpy())
            matrix = basis * factors.eigenvalues.double().numpy().ravel() @ basis.T
        damping = 0.1 * np.trace(matrix) / len(matrix)
        step = np.linalg.solve(matrix + damping * np.eye(len(matrix)), layer.double().numpy().ravel())
        update[name] = torch.from_numpy(step * ALPHA / TRAINING_SIZE).view(layer.shape)
    return update


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "kind"), [("abu", "diagonal"), ("abu_plus", "ekfac"), ("abu_plus_first_order", "ekfac")]
)
def test_each_teacher_gives_its_fishers_scores_one_row_per_query(
    tiny_model: DiffusionModel,
    plan: NoisePlan,
    block: SampleBlock,
    layers: dict[str, Layer],
    fishers: dict[str, Fisher],
    gradients: list[dict[str, Tensor]],
    name: str,
    kind: str,
) -> None:
    """`abu` is `abu_plus` with another Fisher: each is the rise of the loss after its own step."""
    teacher = TEACHERS[name]
    assert teacher.fisher == kind
    updates = updates_of(fishers[kind], gradients)
    base = None if teacher.first_order else training_losses(tiny_model, plan, block, MicroBatch(40))
    scores = teacher.scores(
        tiny_model, layers, plan, block, [stack(updates[:2]), stack(updates[2:])], base, MicroBatch(40)
    )
    found, errors = scores.values, scores.errors
    assert errors.shape == found.shape and bool(errors.isnan().all()) == (not teacher.first_order)
    assert found.shape == (3, len(block.train_ids))
    assert found.dtype == torch.float64

    step = dense_update(fishers[kind], gradients[1])
    of_one = directional_derivative if teacher.first_order else plain_rise
    expected = of_one(tiny_model, plan, block, step)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=2e-3 * expected.norm().item())
    for query, update in enumerate(updates):
        alone = teacher.scores(tiny_model, layers, plan, block, [stack([update])], base, MicroBatch(40)).values[0]
        torch.testing.assert_close(found[query], alone, rtol=0, atol=1e-5 * alone.norm().item())


@pytest.mark.heavy
def test_teachers_of_different_fishers_score_differently(
    tiny_model: DiffusionModel,
    plan: NoisePlan,
    block: SampleBlock,
    layers: dict[str, Layer],
    fishers: dict[str, Fisher],
    gradients: list[dict[str, Tensor]],
) -> None:
    base = training_losses(tiny_model, plan, block, MicroBatch(40))
    diagonal, ekfac = (
        TEACHERS[name]
        .scores(tiny_model, layers, plan, block, [stack(updates_of(fishers[kind], gradients))], base, MicroBatch(40))
        .values
        for name, kind in (("abu", "diagonal"), ("abu_plus", "ekfac"))
    )
    assert (diagonal - ekfac).norm() > 0.05 * ekfac.norm()


@pytest.fixture
def compiled(tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> DiffusionModel:
    """Compiled by torch up to the point where a back end would make machine code."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    return tiny_model.compiled()


@pytest.mark.integration
def test_compiled_model_scores_as_the_plain_one(
    tiny_model: DiffusionModel, compiled: DiffusionModel, plan: NoisePlan, block: SampleBlock, layers: dict[str, Layer]
) -> None:
    """Weights move under the compiled code too."""
    updates = random_updates(layers)
    found, expected = [], []
    for model, scores in ((compiled, found), (tiny_model, expected)):
        base = training_losses(model, plan, block, MicroBatch(40))
        for name, losses in (("abu_plus", base), ("abu_plus_first_order", None)):
            scores.append(TEACHERS[name].scores(model, layers, plan, block, [updates], losses, MicroBatch(40)).values)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.norm().item())
    assert compiled.compiled_denoisers is not None
    assert compiled.compiled_denoisers.keys() == {"forward", ("taps", *layers)}


@pytest.mark.integration
def test_layers_are_as_steady_in_a_compiled_model(
    tiny_model: DiffusionModel, compiled: DiffusionModel, plan: NoisePlan, block: SampleBlock, layers: dict[str, Layer]
) -> None:
    """Two rows at a time, so that the code is there before anyone looks at two rows."""
    training_losses(compiled, plan, pick(block, [1]), MicroBatch(2))
    steady = [steady_layers(model, layers, block.condition, MicroBatch(2)) for model in (compiled, tiny_model)]
    assert steady[0] == steady[1]
    assert steady[0].keys() == layers.keys()


@pytest.mark.heavy
def test_keys_and_values_that_differ_in_having_a_bias_each_count_their_own(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, layers: dict[str, Layer]
) -> None:
    """They see the same caption, but only one of them a constant besides."""
    model = replace(tiny_model, denoiser=copy.deepcopy(tiny_model.denoiser))
    mixed: dict[str, Layer] = {}
    for name in layers:
        layer = model.denoiser.get_submodule(name)
        if name.endswith("to_v"):
            layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features))
        mixed[name] = layer
    updates = random_updates(mixed, queries=1)
    found = first_order_scores(model, mixed, plan, block, [updates], MicroBatch(40))[0]
    expected = directional_derivative(model, plan, block, {name: change[0] for name, change in updates.items()})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.norm().item())
