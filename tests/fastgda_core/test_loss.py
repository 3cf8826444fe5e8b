from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.schedule import FlowMatchingSchedule, Schedule, load_schedule
from fastgda_core.errors import UsageError


class AffineDenoiser(nn.Module):
    """x, t, c -> gain * x + slope * t + mean(c): a denoiser with a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.slope = nn.Parameter(torch.tensor(0.01))

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        shift = self.slope * timestep + encoder_hidden_states.mean((1, 2))
        return (self.gain * x + shift[:, None, None, None],)


def saved(folder: Path, scheduler_class: type, **config: object) -> Schedule:
    """The schedule of a scheduler's folder."""
    scheduler_class(**config).save_pretrained(folder)
    return load_schedule(folder)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "clean": torch.randn(4, 3, 5, 5, generator=generator),
        "text": torch.randn(4, 6, 8, generator=generator),
        "timesteps": torch.tensor([0, 17, 63, 99]),
        "noise": torch.randn(4, 3, 5, 5, generator=generator),
    }


def alpha_sigma(timesteps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(alpha_bar), sqrt(1 - alpha_bar) of the linear schedule from 1e-4 to 0.02, (n, 1, 1, 1) float64."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))[timesteps.numpy()][:, None, None, None]
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def closed_form_target(prediction_type: str, inputs: dict[str, Tensor]) -> np.ndarray:
    clean, noise = inputs["clean"].double().numpy(), inputs["noise"].double().numpy()
    alpha, sigma = alpha_sigma(inputs["timesteps"])
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[prediction_type]


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_follows_the_prediction_type(
    tmp_path: Path, scheduler_class: type, prediction_type: str, inputs: dict[str, Tensor]
) -> None:
    options = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": prediction_type}
    schedule = saved(tmp_path, scheduler_class, **options)
    target = schedule.target(inputs["clean"], inputs["noise"], inputs["timesteps"])
    np.testing.assert_allclose(target.numpy(), closed_form_target(prediction_type, inputs), atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_mean_squared_residual_of_each_sample(
    tmp_path: Path, prediction_type: str, inputs: dict[str, Tensor]
) -> None:
    schedule = saved(tmp_path, DDPMScheduler, num_train_timesteps=100, prediction_type=prediction_type)
    condition = {"encoder_hidden_states": inputs["text"]}
    loss = per_sample_loss(AffineDenoiser(), schedule, inputs["clean"], condition, inputs["timesteps"], inputs["noise"])

    clean, noise, text = (inputs[name].double().numpy() for name in ("clean", "noise", "text"))
    alpha, sigma = alpha_sigma(inputs["timesteps"])
    shift = 0.01 * inputs["timesteps"].numpy() + text.mean((1, 2))
    prediction = 0.7 * (alpha * clean + sigma * noise) + shift[:, None, None, None]
    residual = prediction - closed_form_target(prediction_type, inputs)
    expected = (residual**2).reshape(4, -1).sum(1) / (3 * 5 * 5)

    assert loss.shape == (4,)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)


def test_flow_matching_is_read_from_the_class_and_from_the_prediction_type(tmp_path: Path) -> None:
    schedule = saved(tmp_path, FlowMatchEulerDiscreteScheduler, num_train_timesteps=10)
    assert isinstance(schedule, FlowMatchingSchedule)
    np.testing.assert_allclose(schedule.sigmas.numpy(), np.arange(1, 11) / 10, rtol=1e-6)
    config = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**config, "num_train_timesteps": 10}))
    shifted = load_schedule(tmp_path)
    assert isinstance(shifted, FlowMatchingSchedule)
    even = np.arange(1, 11) / 10
    np.testing.assert_allclose(shifted.sigmas.numpy(), 3 * even / (1 + 2 * even), rtol=1e-5)


@pytest.mark.parametrize(
    ("scheduler_class", "clips"),
    [(EulerDiscreteScheduler, False), (DPMSolverMultistepScheduler, False), (DDPMScheduler, True)],
)
def test_sampling_clips_the_clean_image_only_where_the_config_says_so(
    tmp_path: Path, scheduler_class: type, clips: bool
) -> None:
    """Latents lie outside of [-1, 1]; the config of a solver that never clips does not say so."""
    scheduler = saved(tmp_path, scheduler_class, num_train_timesteps=100, beta_start=1e-4, beta_end=0.02).scheduler
    scheduler.set_timesteps(4)
    noisy, timestep = torch.full((1, 4, 2, 2), 5.0), scheduler.timesteps[1]
    found = scheduler.step(torch.zeros_like(noisy), timestep, noisy).pred_original_sample
    expected = 1.0 if clips else 5.0 / alpha_sigma(timestep[None])[0].item()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_unknown_prediction_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{tmp_path}.*'score'.*epsilon, v_prediction, sample"):
        saved(tmp_path, DDPMScheduler, num_train_timesteps=100, prediction_type="score")
