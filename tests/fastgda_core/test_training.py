from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.training import CaptionedLatents, DenoiserTrainer, DenoiserTraining

TRAINING = DenoiserTraining(steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=2, seed=3)
CAPTIONS = ["teal", "a red circle", "two crossed green lines", "blue", "a square"]


@pytest.fixture
def data(tiny_model: DiffusionModel) -> CaptionedLatents:
    """Four images, the second with two captions."""
    latents = torch.randn(4, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(1))
    owner = torch.tensor([0, 1, 1, 2, 3])
    return CaptionedLatents(latents, tiny_model.encode_captions(CAPTIONS), owner, tiny_model.encode_captions([""]))


def trainer(model: DiffusionModel, data: CaptionedLatents, training: DenoiserTraining = TRAINING) -> DenoiserTrainer:
    denoiser = copy.deepcopy(model.denoiser).float().requires_grad_(True)
    return DenoiserTrainer(denoiser, model.schedule, data, training)


def weights(denoiser: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in denoiser.parameters()])


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a file, where nothing but data is unpickled."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def test_the_same_seed_gives_the_same_model_bit_for_bit(tiny_model: DiffusionModel, data: CaptionedLatents) -> None:
    first, second = (weights(trainer(tiny_model, data).run()) for _ in range(2))
    other = DenoiserTraining(**{**vars(TRAINING), "seed": 4})
    assert torch.equal(first, second)
    assert not torch.equal(first, weights(trainer(tiny_model, data, other).run()))
    assert not torch.equal(first, weights(tiny_model.denoiser))


@pytest.mark.parametrize("stopped", [0, 1, 4])
def test_a_training_that_was_stopped_goes_on_to_the_same_model(
    tiny_model: DiffusionModel, data: CaptionedLatents, stopped: int
) -> None:
    losses: list[float] = []
    expected = weights(trainer(tiny_model, data).run(on_step=lambda step, loss, ema: losses.append(loss)))
    before, after = (trainer(tiny_model, data) for _ in range(2))
    before.run(stopped)
    after.restore(stored(before.state()))
    again: list[float] = []
    found = after.run(on_step=lambda step, loss, ema: again.append(loss))
    assert torch.equal(weights(found), expected) and again == losses[stopped:]


def test_what_is_removed_is_not_trained_on(tiny_model: DiffusionModel, data: CaptionedLatents) -> None:
    fewer = data.without(torch.tensor([1, 3]))
    assert torch.equal(fewer.latents, data.latents[[0, 2]])
    assert fewer.owner.tolist() == [0, 1]
    for name, rows in data.condition.items():
        assert torch.equal(fewer.condition[name], rows[[0, 3]])
    assert torch.equal(data.without(torch.tensor([], dtype=torch.int64)).owner, data.owner)
    changed = CaptionedLatents(data.latents.clone(), data.condition, data.owner, data.empty)
    changed.latents[[1, 3]] = 100
    found = [weights(trainer(tiny_model, each.without(torch.tensor([1, 3]))).run()) for each in (data, changed)]
    assert torch.equal(*found)


def test_each_image_is_drawn_as_often_however_many_captions_it_has(
    tiny_model: DiffusionModel, data: CaptionedLatents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 400 x 4 draws an image has 400, give or take four deviations; the empty caption has a tenth."""
    drawn, empty = torch.zeros(4), 0

    def loss(denoiser: object, schedule: object, clean: Tensor, condition: dict[str, Tensor], *rest: Tensor) -> Tensor:
        nonlocal empty
        drawn.add_(torch.stack([(clean == image).flatten(1).all(1).sum() for image in data.latents]))
        text = condition["encoder_hidden_states"]
        empty += int((text == data.empty["encoder_hidden_states"]).flatten(1).all(1).sum())
        return clean.new_zeros(1, requires_grad=True)

    monkeypatch.setattr("fastgda_core.diffusion.training.per_sample_loss", loss)
    some = trainer(tiny_model, data)
    for _ in range(400):
        some._loss()
    assert drawn.sum() == 1600 and bool(((drawn - 400).abs() < 4 * 1600**0.5 * (3 / 16) ** 0.5).all())
    assert abs(empty - 160) < 4 * 12
