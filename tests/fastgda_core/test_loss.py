from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from fastgda_core.diffusion.loss import per_sample_loss, prediction_target
from fastgda_core.errors import UsageError


class AffineDenoiser(nn.Module):
    """x, t, c -> gain * x + slope * t + mean(c): a denoiser with a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.slope = nn.Parameter(torch.tensor(0.01))

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        shift = self.slope * t + encoder_hidden_states.mean((1, 2))
        return (self.gain * x + shift[:, None, None, None],)


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


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_follows_the_prediction_type(
    scheduler_class: type, prediction_type: str, inputs: dict[str, Tensor]
) -> None:
    scheduler = scheduler_class(num_train_timesteps=100, prediction_type=prediction_type)
    target = prediction_target(scheduler, inputs["clean"], inputs["noise"], inputs["timesteps"])
    np.testing.assert_allclose(target.numpy(), closed_form_target(prediction_type, inputs), atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_mean_squared_residual_of_each_sample(prediction_type: str, inputs: dict[str, Tensor]) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
    loss = per_sample_loss(AffineDenoiser(), scheduler, **inputs)

    clean, noise, text = (inputs[name].double().numpy() for name in ("clean", "noise", "text"))
    alpha, sigma = alpha_sigma(inputs["timesteps"])
    shift = 0.01 * inputs["timesteps"].numpy() + text.mean((1, 2))
    prediction = 0.7 * (alpha * clean + sigma * noise) + shift[:, None, None, None]
    residual = prediction - closed_form_target(prediction_type, inputs)
    expected = (residual**2).reshape(4, -1).sum(1) / (3 * 5 * 5)

    assert loss.shape == (4,)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)


def test_unknown_prediction_type_is_named(inputs: dict[str, Tensor]) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type="score")
    with pytest.raises(UsageError, match=r"'score'.*epsilon, v_prediction or sample"):
        per_sample_loss(AffineDenoiser(), scheduler, **inputs)
